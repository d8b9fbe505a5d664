"""The command line: dispatch to the commands, and configs by name from any folder."""

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import REPOSITORY

from cpsc_jax import datasets, nets, schema
from cpsc_jax import main as run
from cpsc_jax.__main__ import COMMANDS, main, program
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import METHODS

DIGITS = REPOSITORY / "configs" / "digits.py"
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
OF_DIGITS = """from cpsc_jax.configs import digits

def get_config(variant=""):
  c = digits.get_config()
  {}
  return c
"""


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage_is_printed_without_importing_jax(argv):
  code = f"import sys; from cpsc_jax.__main__ import main; assert main({argv}) == 0; assert 'jax' not in sys.modules"
  usage = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
  assert "cpsc-jax --config" in usage
  assert all(f"cpsc-jax {command} " in usage for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command, capsys):
  with pytest.raises(SystemExit) as ended:
    main([command, "--help"])
  assert ended.value.code in (0, None)
  assert capsys.readouterr().out.startswith(f"usage: cpsc-jax {command} ")


def test_exit_codes_and_messages_of_commands_are_passed_on(tmp_path, capsys):
  for argv, message in (
    (["convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")], "no file"),
    (["sample", str(tmp_path), "--out", str(tmp_path / "x.png")], "no run and no saved net"),
    (["export", str(tmp_path)], "--out"),
    (["--config", "nowhere.py"], "no config file 'nowhere.py'"),
    (["--config=digits", "--config", "cifar10"], "--config is given twice, digits and cifar10"),
    (["report", 300 * "n"], "File name too long; mend this"),
    (["convrt"], "unknown command 'convrt'; use one of convert, export"),
  ):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and message in error, error


def test_everything_else_is_a_run(monkeypatch):
  seen = []
  monkeypatch.setattr(run, "main", lambda argv: seen.append(argv) or 75)
  assert main(["--config=digits", "--workdir", "w"]) == 75
  assert seen == [["cpsc-jax", "--config=digits", "--workdir", "w"]]


def test_a_run_explains_its_flags(capsys):
  """With the values of the config that is named, its variant and overrides included; without one the defaults."""
  assert main(["--config=digits:smoke", "--config.student.lr=0.07", "--help"]) == 0
  shown = capsys.readouterr().out
  assert "--workdir" in shown and "--config.KEY=VALUE" in shown
  assert "--config.student.lr=0.07 (default: 0.1)" in shown and "--config.schedule.epochs=2 (default: 600)" in shown
  assert all(f"--config.{name}=" in shown for name in schema.KEYS)
  assert "at least 0 and less than 1" in shown and "mse, log" in shown
  assert all(word in shown for word in ("NAME:smoke", "zskt", "mobilenet_v2", "wrn_D_K", "dcgan", "tiny_imagenet"))
  assert run.main(["main", "--help"]) == 0
  assert "--config.student.lr=0.1\n" in capsys.readouterr().out
  assert main(["--config=cmi_cifar10", "-h"]) == 0
  assert "--config.loss.views.temperature=0.1" in capsys.readouterr().out
  assert main(["--config=digit", "--help"]) == 2


def test_what_there_is_and_which_version(capsys):
  assert main(["--list"]) == 0
  shown = capsys.readouterr().out
  for name in (
    *METHODS,
    *nets.NETS,
    *nets.GENERATORS,
    *datasets.DATASETS,
    *run.ready_configs(),
    ":smoke",
    ":cpu",
    ":digits",
  ):
    assert name in shown
  assert "scikit-learn's 8x8 digits" in shown and max(map(len, shown.splitlines())) <= 110
  assert main(["--version"]) == 0
  assert re.match(r"cpsc_jax \d+\.\d+\.\d+ \(jax \d+", capsys.readouterr().out)


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(capsys, tmp_path, digits_dir):
  argv = ["--config=digits:smoke", f"--workdir={tmp_path / 'w'}", f"--config.dataset.data_dir={digits_dir}"]
  assert main([*argv, "--dry-run"]) == 0
  shown = capsys.readouterr().out
  assert "  schedule.epochs = 2\n" in shown and "student.lr" not in shown
  assert "reads   data set digits in" in shown and "no teacher: trains wrn_10_1 for 1 epochs first" in shown
  assert f"writes  {tmp_path / 'w'}, which is new" in shown and not (tmp_path / "w").exists()
  assert re.search(r"student +wrn_10_1, 77,562 parameters", shown)
  found = re.search(r"memory +([\d,]+) MiB .* has ([\d,]+) MiB", shown)
  assert 0 < int(found[1].replace(",", "")) < int(found[2].replace(",", ""))
  assert re.search(r"time +\d+ ms an iteration, 4 iterations: \d+ s and \d+ s of compiling", shown)
  assert main([*argv, "--dry-run", "--config.student.net=nothing"]) == 2
  assert "no net 'nothing'" in capsys.readouterr().err


def test_the_console_script_is_this_main():
  module, _, name = PYPROJECT["project"]["scripts"]["cpsc-jax"].partition(":")
  assert getattr(sys.modules[module], name) is program
  ended = [subprocess.run([sys.executable, "-m", "cpsc_jax", *argv], capture_output=True) for argv in ([], ["convrt"])]
  assert [process.returncode for process in ended] == [0, 2]


def test_every_package_is_installed():
  folders = {path.parent for path in (REPOSITORY / "cpsc_jax").rglob("__init__.py")}
  names = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
  assert set(PYPROJECT["tool"]["setuptools"]["packages"]) - {"cpsc_jax.configs"} == names


@pytest.mark.parametrize("flags", [["--config=digits:smoke"], ["--config", "digits:smoke"]])
def test_ready_configs_by_name(flags, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  by_path, _ = run.parse(["main", f"--config={DIGITS}:smoke", "--config.seed=3"])
  by_name, workdir = run.parse(["main", *flags, "--config.seed=3"])
  assert by_name.to_dict() == by_path.to_dict() and by_name.seed == 3
  assert str(workdir) == "runs/digits_smoke"


def test_every_ready_config_is_found(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert {"digits", "cifar10", "tiny_imagenet", "default"} <= set(run.ready_configs())
  for name, file in run.ready_configs().items():
    config, _ = run.parse(["main", f"--config={name}"])
    assert config.name and run.config_file([f"--config={name}:smoke"]) == (file, "smoke")


def test_files_of_the_user_are_taken_as_they_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("digits.py", "digits"):
    (tmp_path / name).write_text(DIGITS.read_text().replace('c.name = "digits"', 'c.name = "mine"'))
    assert run.parse(["main", f"--config={name}"])[0].name == "mine"
  assert run.config_path("./digits:smoke") == "./digits:smoke"


@pytest.mark.parametrize(
  ("program", "message"),
  [
    ("x = 1", "has no function get_config"),
    ("get_config = 3", "has no function get_config"),
    ("def get_config(variant='')", "mine.py, line 1: expected ':'; mend it."),
    ("import nothing_here", "mine.py, line 1: ModuleNotFoundError: No module named 'nothing_here'; mend it."),
    ("def get_config():\n  return 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero; mend it."),
    ("def get_config():\n  pass", "get_config of mine.py returns NoneType, which is no ml_collections.ConfigDict."),
    ("def get_config():\n  return {'seed': 1}", "get_config of mine.py returns dict, which is no ml_collections"),
    ("def get_config():\n  return ConfigDict({'seed': 1})", "the config has no key 'name'; start from default"),
    (OF_DIGITS.format("c.nothing = 3"), "mine.py, line 5: the config has no key 'nothing'; docs/config.md"),
    (OF_DIGITS.format("c.student.lr = 'high'"), "mine.py, line 5: TypeError: Could not override field 'lr'"),
    (OF_DIGITS.format("c.student.lr = -0.1"), "config.student.lr is -0.1; it must be greater than 0"),
    (OF_DIGITS.format("c.apply('x')"), "mine.py, line 5: "),
  ],
)
def test_what_is_wrong_with_a_config_file_is_told_by_line(program, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    f"from ml_collections import ConfigDict\n{program}" if "Config" in program else program
  )
  with pytest.raises(Refusal) as refused:
    run.parse(["main", "--config=mine.py"])
  assert message in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("digits:cpu", "no variant 'cpu' of config digits; there is 'smoke'"),
    ("cifar10:digits", "no variant 'digits' of config cifar10; there are 'smoke' and 'cpu'"),
    ("fast_cifar10:nonsense", "no variant 'nonsense' of config fast_cifar10; there are 'smoke' and 'cpu'"),
  ],
)
def test_a_variant_that_a_config_lacks_is_refused(config, message):
  with pytest.raises(Refusal, match=message):
    run.parse(["main", f"--config={config}"])


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config=digit"], "no config 'digit'; give one of the ready configs (cifar10, cifar100"),
    (["--config=no/digits"], "no config file 'no/digits'"),
    ([], "--config is required, such as --config digits"),
    (["--config"], "--config is required"),
    (["--config="], "--config is required"),
    (["--config.seed=1"], "--config is required"),
    (["--config=digits", "run"], "unexpected argument 'run'"),
    (["--config=digits", "--wrkdir=w"], "unknown flag --wrkdir"),
    (["--config=digits", "--config.sed=1"], "the config has no key 'sed' (did you mean 'seed'?)"),
    (["--config=digits", "--config.teacher.nett=x"], "the config has no key 'teacher.nett' (did you mean 'net'?)"),
    (["--config=digits", "--config.techer.net=x"], "the config has no key 'techer.net'"),
    (["--config=digits", "--config.seed.a=1"], "the config has no key 'seed.a'"),
    (["--config=digits", "--config.seed=one"], "--config.seed=one"),
    (["--config=digits:quick"], "no variant 'quick'"),
    (["--config=digits", "--workdir=gs://bucket/run"], "--workdir must be a folder, got the address gs://bucket/run"),
  ],
)
def test_bad_flags_are_refused(flags, message):
  with pytest.raises(Refusal) as refused:
    run.parse(["main", *flags])
  assert message in str(refused.value) and "\n" not in str(refused.value)
