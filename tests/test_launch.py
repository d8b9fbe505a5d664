"""The launchers that need a cloud, tested without one: what they would run, and what they do after a preemption."""

import os
import re
import subprocess

import pytest
import yaml
from conftest import REPOSITORY

POD = REPOSITORY / "launch" / "tpu_pod.sh"
# A stand-in for gcloud: the file `state` holds the state of the slice; the run's first attempt is preempted. Copying to
# a slice fails once for each line of the file `unreachable`, copying from it if there is a file `lost`.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE/calls"
case "$4 $*" in
  describe*) cat "$FAKE/state" 2>/dev/null || exit 1 ;;
  create*) echo READY >"$FAKE/state" ;;
  delete*) rm "$FAKE/state" ;;
  scp*recurse*) ! test -e "$FAKE/lost" ;;
  scp*)
    if [ -s "$FAKE/unreachable" ]; then
      sed -i 1d "$FAKE/unreachable"
      exit 255
    fi
    ;;
  ssh*kill*) ;;
  ssh*tail*)
    echo "epoch 1"
    echo attempt >>"$FAKE/attempts"
    if [ "$(wc -l <"$FAKE/attempts")" = 1 ]; then echo PREEMPTED >"$FAKE/state"; exit 1; fi
    ;;
  ssh*cat*exit*) grep -q READY "$FAKE/state" && echo "${FAKE_CODE:-0}" ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
  """Runs tpu_pod.sh with the stand-in for gcloud; returns (exit code, output, calls)."""
  (tmp_path / "gcloud").write_text(GCLOUD)
  (tmp_path / "gcloud").chmod(0o755)

  def run(*argv, code=0):
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "TPU_POD_POLL": "0"}
    command = ["bash", POD, "--name", "slice", "--zone", "z", *argv]
    done = subprocess.run(command, env={**environment, "FAKE_CODE": str(code)}, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done.returncode, done.stdout + done.stderr, calls

  return run


def verbs(calls):
  return [call.split()[3] for call in calls if call.split()[0] == "compute"]


def test_a_preempted_slice_is_created_again_and_the_run_restarted(pod, tmp_path):
  options = ("--type", "v5litepod-16", "--spot", "--bucket", "b", "--back", str(tmp_path / "back"), "--delete")
  code, output, calls = pod(*options, "--", "--config=c.py")
  assert code == 0 and output.count("epoch 1") == 2 and "slice is PREEMPTED; creating it again" in output
  assert verbs(calls).count("create") == 2 and verbs(calls).count("delete") == 2
  assert [call for call in calls if "create" in call][0].split()[-2:] == ["--spot", "--zone=z"]
  started = [call for call in calls if "setsid" in call]
  assert len(started) == 2 and all("--worker=all" in call and "--config=c.py" in call for call in started)
  copied = [call for call in calls if "--recurse" in call]
  assert len(copied) == 1 and calls.index(copied[0]) > calls.index(started[-1]), (
    "results are copied once, after the last attempt"
  )


def test_a_slice_that_does_not_answer_yet_is_tried_again(pod, tmp_path):
  """Preempted, or not up, while the program is installed: that is an attempt, not the end."""
  (tmp_path / "unreachable").write_text("once\ntwice\n")
  code, output, calls = pod("--type", "t", "--back", str(tmp_path / "back"), "--", "--config=c.py")
  assert code == 0 and output.count("ended with exit code 75; restarting it") == 3
  assert len([call for call in calls if "setsid" in call]) == 2, "after the two that failed; one is preempted"
  (tmp_path / "unreachable").write_text(5 * "again\n")
  (tmp_path / "state").write_text("READY\n")
  assert pod("--type", "t", "--restarts", "3", "--back", str(tmp_path / "back"), "--", "--config=c.py")[0] != 0


def test_what_would_lose_the_run_is_refused(pod, tmp_path):
  code, output, calls = pod("--type", "t", "--spot", "--", "--config=c.py")
  assert code == 2 and "--spot needs --bucket" in output and not calls
  (tmp_path / "lost").touch()
  code, output, calls = pod("--type", "t", "--back", str(tmp_path / "back"), "--delete", "--", "--config=c.py")
  assert code == 1 and "nothing was copied from slice:cpsc_jax_run" in output
  assert verbs(calls).count("delete") == 1, "of the preempted one alone"


def test_a_refusal_ends_the_run_and_the_slice_is_reused(pod, tmp_path):
  (tmp_path / "state").write_text("READY\n")
  (tmp_path / "attempts").write_text("the one that is preempted\n")
  code, output, calls = pod("--type", "t", "--back", str(tmp_path), "--", "--config=c.py", code=2)
  assert code == 2 and output.count("epoch 1") == 1
  assert "create" not in verbs(calls) and "delete" not in verbs(calls)


def test_dry_run_and_help(pod, tmp_path):
  code, output, calls = pod("--type", "t", "--bucket", "b", "--delete", "--dry-run", "--", "--config=c.py")
  assert code == 0 and not calls
  for word in (
    "tpu-vm create slice",
    "scp",
    "gcsfuse --implicit-dirs b",
    "--workdir\\ /mnt/cpsc_jax/run",
    "delete slice",
  ):
    assert word in output
  assert "--restarts N" in pod("--help")[1]
  assert pod("--frobnicate")[0] == 2


def test_gcloud_knows_the_flags(pod):
  """If the real gcloud is installed, its help lists every flag that the script uses."""
  if subprocess.run(["sh", "-c", "command -v gcloud"], capture_output=True).returncode:
    pytest.skip("gcloud is not installed here")
  output = pod("--type", "t", "--spot", "--bucket", "b", "--delete", "--dry-run", "--", "--config=c.py")[1]
  for verb in ("create", "ssh", "scp", "delete"):
    text = subprocess.run(
      ["gcloud", "compute", "tpus", "tpu-vm", verb, "--help"], capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"--[a-z-]+", re.sub(r"\x1b\[\d*m", "", text)))
    line = next(line for line in output.splitlines() if f"tpu-vm {verb} " in line)
    assert set(re.findall(r" (--[a-z-]+)", line.split("--command")[0])) <= known, verb


# The fields of the JobSet API v1alpha2 (kubernetes-sigs/jobset) at the places that the file uses.
FIELDS = {
  "": {"apiVersion", "kind", "metadata", "spec", "status"},
  "spec": {
    "coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy",
    "suspend", "ttlSecondsAfterFinished", "volumeClaimPolicies",
  },
  "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
  "spec.failurePolicy.rules[]": {
    "action", "name", "onJobFailureMessagePatterns", "onJobFailureReasons", "targetReplicatedJobs",
  },
  "spec.replicatedJobs[]": {"dependsOn", "groupName", "name", "replicas", "template"},
  "spec.replicatedJobs[].template": {"metadata", "spec"},
}  # fmt: skip


def nodes(tree, path=""):
  """(path, mapping) of every mapping of a YAML tree; lists are written []."""
  if isinstance(tree, dict):
    yield path, tree
    for key, value in tree.items():
      yield from nodes(value, f"{path}.{key}".lstrip("."))
  elif isinstance(tree, list):
    for value in tree:
      yield from nodes(value, f"{path}[]")


def test_jobset():
  jobset = yaml.safe_load((REPOSITORY / "launch" / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  for path, mapping in nodes(jobset):
    assert mapping.keys() <= FIELDS.get(path, mapping.keys()), path
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet" and re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = eval(pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].replace("x", "*"))
  assert job["parallelism"] == job["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
  (policy,) = job["podFailurePolicy"]["rules"]
  assert pod["restartPolicy"] == "Never", "what a pod failure policy needs"
  assert policy["onExitCodes"]["containerName"] == container["name"] and policy["onExitCodes"]["values"] == [2, 3]
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_job_in_the_jobset_fits_kubernetes_schema():
  kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
  jobset = yaml.safe_load((REPOSITORY / "launch" / "jobset.yaml").read_text())
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
  kubernetes_validate.validate(job, "1.31", strict=True)
