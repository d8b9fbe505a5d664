"""Reads the weights in a checkpoint file that somebody else made. Nothing in it is ever executed.

Pickled files go through PyTorch's restricted unpickler, which builds tensors and plain containers and calls nothing
else; safetensors files hold no code and need no PyTorch.
"""

import hashlib
import pathlib
import re
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np

from cpsc_jax.errors import Refusal

MOST_TENSORS = 10_000
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile and wrapping modules
SAFETENSORS_TYPES = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}
COUNTER = "num_batches_tracked"

# Bookkeeping that training scripts save beside the weights. Each is read as an `Inert` object and dropped.
HARMLESS = (
  "argparse.Namespace",
  "datetime.datetime",
  "pathlib.PosixPath",
  "pathlib.PurePosixPath",
  "pathlib.WindowsPath",
  "pathlib._local.PosixPath",
  "_codecs.encode",  # within NumPy's scalars
  "numpy.dtype",
  "numpy.ndarray",
  *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
SAVE_ALONE = (
  "if you trust its maker, save the weights alone where it was made, by torch.save(model.state_dict(), FILE) or as"
  " safetensors"
)
WANTED = f"a state dict of tensors is wanted, alone or under {', '.join(WRAPPERS)}"


class Inert:
  """What a harmless object of a pickle becomes: nothing."""

  def __new__(cls, *_, **__):
    return object.__new__(cls)

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


def read(path):
  """({key: float32 array}, sha256 hex) of a checkpoint file, without wrappers, prefixes and batch counters.

  Raises:
    Refusal: anything but a readable file of finite floating-point tensors.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise Refusal(f"no file '{path}'; name a PyTorch checkpoint (.pth, .pt, .th, .ckpt) or a .safetensors file.")
  try:
    with path.open("rb") as file:
      start = file.read(9)
      file.seek(0)
      sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise Refusal(f"cannot read {path} ({error.strerror}).") from error
  is_safetensors = path.suffix == ".safetensors" or start[8:] == b"{"
  if start.startswith(b"PK") or zipfile.is_zipfile(path):
    _check_zip(path)
  arrays = (_read_safetensors if is_safetensors else _read_torch)(path)
  return _without_prefix(_checked(path, arrays)), sha256


def _read_safetensors(path):
  from safetensors import SafetensorError, deserialize

  try:
    entries = deserialize(path.read_bytes())
  except (SafetensorError, ValueError) as error:
    raise Refusal(f"{path} is no intact safetensors file ({_reason(error)}); get it again.") from error
  arrays = {}
  for key, entry in entries:
    if key.endswith(COUNTER):
      continue
    if entry["dtype"] not in SAFETENSORS_TYPES:
      _refuse_type(path, key, entry["dtype"])
    arrays[key] = np.frombuffer(entry["data"], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])
  return arrays


def _read_torch(path):
  try:
    import torch
  except (ImportError, OSError) as error:  # the latter where its libraries do not load
    raise Refusal(
      f"reading {path} needs PyTorch: pip install 'cpsc_jax[torch]' (.safetensors files are read without it)."
    ) from error
  harmless = torch.serialization.safe_globals([(Inert, name) for name in HARMLESS])
  try:
    with harmless, warnings.catch_warnings(action="ignore"):
      content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # damaged files raise assorted types
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
      raise Refusal(
        f"{path} holds '{refused[1]}', which is not loaded because loading it could run code; {SAVE_ALONE}."
      ) from error
    raise Refusal(
      f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)}): it is damaged or holds more than weights; get"
      f" it again, or, {SAVE_ALONE}."
    ) from error
  tensors = _unwrapped(path, content)
  size, arrays = path.stat().st_size, {}
  for key, tensor in tensors.items():
    if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
      raise Refusal(f"{path}: the entry '{str(key)[:100]}' is not a tensor under a name; {WANTED}.")
    if key.endswith(COUNTER):
      continue
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if tensor.dtype not in floating or not plain:
      kind = str(tensor.dtype) if plain or tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
      _refuse_type(path, key, kind.removeprefix("torch."))
    size -= tensor.numel() * tensor.element_size()
    if size < 0:  # before any is copied: a stretched or shared storage can claim any size
      raise Refusal(f"{path}: its tensors claim more bytes than the file has; it is damaged or made to do harm.")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    arrays[key] = tensor.detach().to(wide).numpy(force=True)
  return arrays


def _check_zip(path):
  """PyTorch stores its entries as they are, one after another; anything else is damaged or a bomb."""
  try:
    with zipfile.ZipFile(path) as archive:
      entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
      fault = _zip_fault(entries, path.stat().st_size)
      damaged = None if fault else archive.testzip()  # PyTorch itself does not look at the checksums
  except Exception as error:  # zipfile raises assorted types
    raise Refusal(f"{path} is a damaged zip archive ({_reason(error)}); get it again.") from error
  if fault:
    raise Refusal(f"{path} is a zip archive that {fault}; get the checkpoint again, from a source that you trust.")
  if damaged:
    raise Refusal(f"{path} is damaged: '{damaged[:100]}' in it does not match its checksum; get it again.")


def _zip_fault(entries, size):
  names = [entry.filename for entry in entries]
  ends = [entry.header_offset + 30 + len(entry.orig_filename.encode()) + entry.compress_size for entry in entries]
  starts = [entry.header_offset for entry in entries[1:]] + [size]
  if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
    return "is compressed, which PyTorch's never are and zip bombs are"
  if any(end > start for end, start in zip(ends, starts, strict=bool(entries))):
    return "has entries that overlap or reach beyond its end"
  if len(set(names)) < len(names) or any(name.startswith(("/", "\\")) or ".." in name for name in names):
    return "has entries of the same name or with a path out of the archive"
  return None


def _unwrapped(path, content):
  for _ in range(4):
    if not isinstance(content, dict):
      raise Refusal(f"{path} holds {type(content).__name__}; {WANTED}.")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if inner is None:
      break
    content = inner
  else:
    raise Refusal(f"{path}: its dicts are nested too deep; {WANTED}.")
  return content


def _checked(path, arrays):
  """The arrays as float32, finite and with variances that are none below zero."""
  if not arrays:
    raise Refusal(f"{path} holds no weights; {WANTED}.")
  if len(arrays) > MOST_TENSORS:
    raise Refusal(f"{path} has {len(arrays):,} tensors; no network here has more than {MOST_TENSORS:,}.")
  with np.errstate(over="ignore"):
    arrays = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
  for key, array in arrays.items():
    if not array.size:
      raise Refusal(f"{path}: '{key[:100]}' has the shape {array.shape}, in which nothing is; get the file again.")
    if not np.isfinite(array).all():
      raise Refusal(f"{path}: '{key[:100]}' has values that are NaN, infinite or beyond float32; get the file again.")
    if key.endswith("running_var") and (array < 0).any():
      raise Refusal(f"{path}: '{key[:100]}' has negative variances, which cannot be; get the file again.")
  return arrays


def _without_prefix(arrays):
  while True:
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in arrays)), None)
    if not prefix:
      return arrays
    arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}


def _refuse_type(path, key, kind):
  raise Refusal(
    f"{path}: '{key[:100]}' is {kind}, but weights must be float16, bfloat16, float32 or float64; save them"
    " as such (a quantised model before its quantisation)."
  )


def _reason(error):
  """What an error says in one line, of PyTorch's long ones the part that is about the file."""
  text = " ".join(str(error).split())
  found = re.search(r"WeightsUnpickler error: (.*?)(?: Check the documentation|$)", text)
  return f"{type(error).__name__}: {(found[1] if found else text.split('. ')[0])[:200]}"
