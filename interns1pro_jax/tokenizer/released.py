"""The tokenizer files of a released directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer.detection import Kind

_REMEDY = (
    "give a directory of the released layout (vocab.json, merges.txt, tokenizer_config.json, "
    "chat_template.jinja, tokenizer_{SMILES,PROT,XNA}.model)"
)
_NAMES = {Kind.SMILES: "SMILES", Kind.PROTEIN: "PROT", Kind.XNA: "XNA"}


@dataclasses.dataclass(frozen=True)
class ReleasedFiles:
    """What the files say.

    Attributes:
      directory: where they are.
      vocab: byte-mapped token of plain text to id: the ids 0, 1, ... without gaps.
      merges: pairs of tokens, in the order of their rank.
      added: added token to id; hidden: those of them that decoding can leave out.
      models: file and first id of each segment model.
      chat_template: in Jinja.
      digest: SHA-256 of all of it.
    """

    directory: Path
    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Mapping[str, int]
    hidden: frozenset[str]
    models: Mapping[Kind, tuple[Path, int]]
    chat_template: str
    digest: str

    @classmethod
    def read(cls, directory: str | Path) -> ReleasedFiles:
        """Raises:
        ConfigError: a file is missing or not what it should be.
        """
        directory = Path(directory)
        config = _json(directory / "tokenizer_config.json")
        path = directory / "vocab.json"
        vocab = _json(path)
        try:
            added = {str(token["content"]): int(index) for index, token in config["added_tokens_decoder"].items()}
            named = [config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")]
            hidden = frozenset({str(token) for token in named if token} | set(config["additional_special_tokens"]))
            models = {kind: (directory / f"tokenizer_{name}.model", int(config[f"offset_{name}"])) for kind, name in _NAMES.items()}
            # The rest of vocab.json are names of the segment models' ids that are never produced.
            first = min(added.values())
            plain = {str(token): int(index) for token, index in vocab.items() if index < first}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{directory}/tokenizer_config.json is not the released one ({error!r}); {_REMEDY}.") from error
        if sorted(plain.values()) != list(range(first)):
            raise ConfigError(f"{path} must give the ids below {first}, each once; {_REMEDY}.")
        template = _text(directory / "chat_template.jinja")
        merges = _merges(directory / "merges.txt")
        paths = [path, directory / "merges.txt", directory / "tokenizer_config.json", directory / "chat_template.jinja"]
        return cls(directory, plain, merges, added, hidden, models, template, _digest([*paths, *(model for model, _ in models.values())]))


def _digest(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(_bytes(path)).digest())
    return total.hexdigest()


def _merges(path: Path) -> list[tuple[str, str]]:
    first, _, rest = _text(path).partition("\n")
    lines = (rest if first.startswith("#version:") else f"{first}\n{rest}").split("\n")
    pairs = [line.split() for line in lines if line.strip()]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise ConfigError(f"{path}: {' '.join(wrong)!r} is not a pair of tokens; {_REMEDY}.")
    return [(first, second) for first, second in pairs]


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; {_REMEDY}.")
    return content


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); fetch it again.") from error


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {_REMEDY}.")
    return path.read_bytes()
