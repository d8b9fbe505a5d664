"""Reads the weights from a checkpoint file of unknown origin, without executing anything in it.

Pickled files go through PyTorch's restricted unpickler, which builds tensors and plain containers and calls nothing
else; safetensors files contain no code and need no PyTorch.
"""

import hashlib
import io
import pathlib
import pickletools
import re
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np

from cpsc_jax import files
from cpsc_jax.errors import Refusal

MOST_TENSORS = 10_000
MOST_ENTRIES = 15_000  # of an archive: tensors, those of an optimiser among them, and a few small files
LARGEST_HEADER = 2**24  # bytes of the header of a safetensors file
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # added by DataParallel, torch.compile and wrapper modules
SAFETENSORS_TYPES = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}
COUNTER = "num_batches_tracked"

# Types that training scripts save beside the weights. Each is read as an `Inert` object and dropped.
HARMLESS = (
  "argparse.Namespace",
  "datetime.datetime",
  "pathlib.PosixPath",
  "pathlib.PurePosixPath",
  "pathlib.WindowsPath",
  "pathlib._local.PosixPath",
  "_codecs.encode",  # part of pickled NumPy scalars
  "numpy.dtype",
  "numpy.ndarray",
  *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
SAVE_WEIGHTS = (
  "if you trust the file, load it where it was made and save only the weights, with torch.save(model.state_dict(),"
  " FILE) or as safetensors"
)
EXPECTED = f"expected a state dict of tensors, at the top level or under one of the keys {', '.join(WRAPPERS)}"


class Inert:
  """Stands in for every object of a HARMLESS type; it keeps no content."""

  def __new__(cls, *_, **__):
    return object.__new__(cls)

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
  """({key: float32 array}, sha256 hex) of a checkpoint file; wrappers, prefixes and batch counters are removed.

  Raises:
    Refusal: the file is anything but a readable file of finite floating-point tensors.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise Refusal(f"no file '{path}'; give a PyTorch checkpoint (.pth, .pt, .th, .ckpt) or a .safetensors file.")
  try:
    with files.opened(path, files.memory() // 3) as file:  # it is read, and its arrays are copied
      start = file.read(9)
      file.seek(0)
      sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise Refusal(f"cannot read {path} ({error.strerror}); give a file that this machine's memory holds.") from error
  is_safetensors = path.suffix == ".safetensors" or start[8:] == b"{"
  if is_safetensors and int.from_bytes(start[:8], "little") > LARGEST_HEADER:
    raise Refusal(f"{path} is not a valid safetensors file: its header is too large; download it again.")
  if start.startswith(b"PK") or zipfile.is_zipfile(path):
    _check_zip(path)
  elif not is_safetensors:
    with path.open("rb") as file:
      _check_pickles(path, file)
  arrays = (_read_safetensors if is_safetensors else _read_torch)(path)
  return _without_prefix(_checked(path, arrays)), sha256


def _read_safetensors(path):
  from safetensors import SafetensorError, deserialize

  try:
    entries = deserialize(path.read_bytes())
  except (SafetensorError, ValueError, OverflowError) as error:
    raise Refusal(f"{path} is not a valid safetensors file ({_reason(error)}); download it again.") from error
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
  except (ImportError, OSError) as error:  # OSError: a shared library of PyTorch does not load
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
        f"{path} contains '{refused[1]}', which is not loaded because loading it could run code; {SAVE_WEIGHTS}."
      ) from error
    raise Refusal(
      f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)}): it is damaged or contains more than weights;"
      f" download it again, or, {SAVE_WEIGHTS}."
    ) from error
  tensors = _unwrapped(path, content)
  size, arrays = path.stat().st_size, {}
  for key, tensor in tensors.items():
    if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
      raise Refusal(f"{path}: the entry '{str(key)[:100]}' is not a named tensor; {EXPECTED}.")
    if key.endswith(COUNTER):
      continue
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if tensor.dtype not in floating or not plain:
      kind = str(tensor.dtype) if plain or tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
      _refuse_type(path, key, kind.removeprefix("torch."))
    size -= tensor.numel() * tensor.element_size()
    if size < 0:  # checked before copying: an expanded or shared storage can have any size
      raise Refusal(f"{path}: its tensors have more bytes than the file; it is damaged or malicious, do not use it.")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    arrays[key] = tensor.detach().to(wide).numpy(force=True)
  return arrays


def _check_zip(path):
  """Refuses an archive that is not as PyTorch writes it: uncompressed entries, one after another, checksums right."""
  try:
    with zipfile.ZipFile(path) as archive:
      entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
      fault = _zip_fault(entries, path.stat().st_size)
      damaged = None if fault else archive.testzip()  # PyTorch does not verify checksums
      if not fault and not damaged:
        for name in archive.namelist():
          if name.endswith("data.pkl"):
            _check_pickles(path, io.BytesIO(archive.read(name)))
  except Refusal:
    raise
  except Exception as error:  # zipfile raises assorted types
    raise Refusal(f"{path} is a damaged zip archive ({_reason(error)}); download it again.") from error
  if fault:
    raise Refusal(f"{path} is a zip archive that {fault}; download it again, from a source that you trust.")
  if damaged:
    raise Refusal(f"{path} is damaged: '{damaged[:100]}' in it does not match its checksum; download it again.")


def _check_pickles(path, file):
  """Refuses more tensors than any net has before they are loaded, which takes about a millisecond for each."""
  count = 0
  try:
    for _ in range(4):  # of a file from before PyTorch 1.6, whose fourth pickle holds the weights
      for opcode, _, _ in pickletools.genops(file):
        count += opcode.name == "BINPERSID"
        if count > MOST_ENTRIES:
          raise Refusal(
            f"{path} has more than {MOST_ENTRIES:,} tensors; no supported net has more than {MOST_TENSORS:,}."
          )
  except Refusal:
    raise
  except Exception:  # no pickle, which PyTorch tells better
    return


def _zip_fault(entries, size):
  if len(entries) > MOST_ENTRIES:
    return f"has {len(entries):,} entries, more than {MOST_ENTRIES:,}, unlike any supported net's"
  names = [entry.filename for entry in entries]
  ends = [entry.header_offset + 30 + len(entry.orig_filename.encode()) + entry.compress_size for entry in entries]
  starts = [entry.header_offset for entry in entries[1:]] + [size]
  if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
    return "is compressed, unlike PyTorch's archives (it may be a zip bomb)"
  if any(end > start for end, start in zip(ends, starts, strict=bool(entries))):
    return "has entries that overlap or extend past its end"
  if len(set(names)) < len(names) or any(name.startswith(("/", "\\")) or ".." in name for name in names):
    return "has entries with equal names or with paths that leave the archive"
  return None


def _unwrapped(path, content):
  for _ in range(4):
    if not isinstance(content, dict):
      raise Refusal(f"{path} contains an object of type {type(content).__name__}; {EXPECTED}.")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if inner is None:
      break
    content = inner
  else:
    raise Refusal(f"{path}: its dicts are nested too deeply; {EXPECTED}.")
  return content


def _checked(path, arrays):
  """The arrays as float32; refuses NaN, infinities, empty arrays and negative variances."""
  if not arrays:
    raise Refusal(f"{path} contains no weights; {EXPECTED}.")
  if len(arrays) > MOST_TENSORS:
    raise Refusal(f"{path} has {len(arrays):,} tensors; no supported net has more than {MOST_TENSORS:,}.")
  with np.errstate(over="ignore"):
    arrays = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
  for key, array in arrays.items():
    if not array.size:
      raise Refusal(f"{path}: '{key[:100]}' is empty, of shape {array.shape}; download the file again.")
    if not np.isfinite(array).all():
      raise Refusal(f"{path}: '{key[:100]}' has values that are NaN, infinite or beyond float32; use another file.")
    if key.endswith("running_var") and (array < 0).any():
      raise Refusal(f"{path}: '{key[:100]}' has negative variances; download the file again.")
  return arrays


def _without_prefix(arrays):
  while True:
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in arrays)), None)
    if not prefix:
      return arrays
    arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}


def _refuse_type(path, key, kind):
  raise Refusal(
    f"{path}: '{key[:100]}' is {kind}, but weights must be float16, bfloat16, float32 or float64; convert them before"
    " saving (for a quantised model, save it before quantisation)."
  )


def _reason(error):
  """The message of an error in one line; of PyTorch's long messages the part about the file."""
  text = " ".join(str(error).split())
  found = re.search(r"WeightsUnpickler error: (.*?)(?: Check the documentation|$)", text)
  return f"{type(error).__name__}: {(found[1] if found else text.split('. ')[0])[:200]}"
