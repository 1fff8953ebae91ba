"""The files of a Hugging Face checkpoint: weights from safetensors alone, one tensor at a time, and the sentencepiece tokenizer."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError
from kan_train.config import ConfigError
from kan_train.data_tools.tokenizer import Tokenizer, require_exact

INDEX = "model.safetensors.index.json"
TOKENIZER_MODEL = "tokenizer.model"

_SAVE_AGAIN = "save it as such with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
# A message that comes twice is merged by protobuf, the later fields winning: normalizer_spec (3) { add_dummy_prefix (3) = false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Weights:
    """Tensors of a checkpoint by their names, in one file or several; each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """ConfigError where `folder` has no safetensors (pickled weights are never read), or a file of its index is missing."""
        self.folder = folder
        self.files: dict[str, Path] = {}
        """Name of each tensor -> its file."""
        for path in self._paths():
            with _reading(path), safe_open(path, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), path)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, which must have `shape`, as it is stored. ConfigError where it is missing or is not."""
        path = self.files.get(name)
        if path is None:
            raise ConfigError(f"{self.folder} has no tensor {name}, which its config.json asks for; get the checkpoint again")
        with _reading(path), safe_open(path, framework="pt") as opened:
            tensor = opened.get_tensor(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, by config.json it has floating-point numbers {list(shape)}")
        return tensor

    def numbers(self) -> int:
        """Elements of all tensors."""
        total = 0
        for path in set(self.files.values()):
            with _reading(path), safe_open(path, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (it is no mapping)
        return total

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            if (whole := self.folder / "model.safetensors").is_file():
                return [whole]
            pickled = next((path.name for path in self.folder.glob("*.bin")), None)
            found = f"its weights are pickled ({pickled}), and reading those would run their code" if pickled else f"there is no model.safetensors nor {INDEX}"
            raise ConfigError(f"{self.folder}: {found}; {_SAVE_AGAIN}")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is no index of weights ({error!r}); get the checkpoint again") from None
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise ConfigError(f"{index} names {strange[0]!r}, which is no safetensors file of this folder; {_SAVE_AGAIN}")
        missing = next((name for name in names if not (self.folder / name).is_file()), None)
        if missing is not None:
            raise ConfigError(f"{index} names {missing}, which is not there; get that file too")
        return [self.folder / name for name in names]


def carried_tokenizer(folder: Path, file: Path | None = None) -> tuple[bytes, int]:
    """(sentencepiece model, its tokens): that of the checkpoint, or `file`, without the space that it would put before every text.

    Our texts come back as they were given, piece by piece too: a space of the tokenizer's own would be no part of them. ConfigError where there is no
    sentencepiece tokenizer, where it changes texts otherwise, or where its token 1 is no control token.
    """
    path = file or folder / TOKENIZER_MODEL
    if not path.is_file():
        fast = " (tokenizer.json alone is one of the library `tokenizers`)" if (folder / "tokenizer.json").is_file() else ""
        raise ConfigError(
            f"{path} is missing, and kan-train reads sentencepiece tokenizers alone{fast}; upcycle a checkpoint that has one, such as those of Llama 1 and 2, "
            "TinyLlama and Mistral, or name the sentencepiece model of the same tokens with --tokenizer FILE"
        )
    content = path.read_bytes() + _NO_DUMMY_PREFIX
    with tempfile.NamedTemporaryFile(suffix=TOKENIZER_MODEL) as written:
        written.write(content)
        written.flush()
        try:
            tokenizer = Tokenizer(Path(written.name))
            require_exact(tokenizer, path)
        except ConfigError:
            raise ConfigError(
                f"{path} cannot be the tokenizer of a run: that is a sentencepiece model with a control token as token 1 (the start of a document), which "
                "falls back to bytes and gives every text back as it was; use a checkpoint with one, or --tokenizer FILE"
            ) from None
    return content, tokenizer.vocab_size


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around a read of `path`: its failures name it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); get the file again, or {_SAVE_AGAIN}") from error
