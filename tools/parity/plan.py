"""Which check covers which file. Everything is derived from names of files and from what is in them, never from directories'."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from interns1pro_jax.config import ModelConfig
from tools.parity import decoder, generation, stored, text, towers, training
from tools.parity.golden import Golden, Row
from tools.parity.subject import Subject

Check = Callable[[Golden, Subject], None]

# Files of a checkpoint's directory: the first pattern that matches the whole name counts.
CHECKS: tuple[tuple[str, Check], ...] = (
    (r"config\.json", stored.check_config),
    (r"model(-\d+-of-\d+)?\.safetensors", stored.check_weights),
    (r"dequantized\.safetensors", stored.check_dequantized),
    (r"dequantized_sums\.json", stored.check_dequantized_sums),
    (r"text.*\.npz", decoder.check_text),
    (r"mm_.*\.npz", decoder.check_multimodal),
    (r"fope.*\.npz", decoder.check_fope),
    (r"vision_.*\.npz", towers.check_vision),
    (r"time_series_batch.*\.npz", towers.check_time_series_batch),
    (r"time_series_cases\.json", towers.check_time_series_cases),
    (r"time_series.*\.npz", towers.check_time_series),
    (r"generate_.*\.npz", generation.check_generation),
    (r"train_grad_norms.*\.json", training.check_gradient_norms),
    (r"train.*\.npz", training.check_train),
)

# Files about the model of the released size.
_RELEASED_SIZE: dict[str, Callable[[Golden, ModelConfig], None]] = {
    "key_patterns.json": stored.check_key_patterns,
    "real_frequencies.npz": stored.check_frequencies,
}

# Files about text: the tokenizer's own, and what it makes of texts and conversations.
_TEXT: dict[str, Callable[[Golden, text.Text], None]] = {
    "added_tokens.json": text.check_added_tokens,
    "chat_template.json": text.check_chat,
    "sentencepiece_segments.json": text.check_segments,
    "special_tokens_map.json": text.check_special_tokens,
    "tokenizer.json": text.check_tokenizer,
    "tokenizer_config.json": text.check_tokenizer_config,
    "vocab.json": text.check_vocabulary,
}

# Files that say nothing to compare with (merges, template and segment models are behind the checks of text), and files that come
# with the input pipeline; paths relative to the reference.
IGNORED = (
    *(r"(.*/)?README\.md", r"(.*/)?model\.safetensors\.index\.json", r"(.*/)?LICENSE[^/]*", r"(.*/)?\.[^/]*"),
    r"(.*/)?(chat_template\.jinja|merges\.txt|tokenizer_\w+\.model)",
)
LATER = (
    r"(.*/)?preprocess/.*",
    r"(.*/)?(generation_config|preprocessor_config|video_preprocessor_config)\.json",
)
WHY_LATER = "comes with the input pipeline"


def is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("model*.safetensors"))


def subject_directory(reference: Path, path: Path) -> Path | None:
    """The checkpoint that a file belongs to: the nearest directory above it, `reference` at most; None if there is none."""
    for directory in path.parents:
        if is_checkpoint(directory):
            return directory
        if directory == reference:
            break
    return None


def check_for(name: str) -> Check | None:
    return next((check for pattern, check in CHECKS if re.fullmatch(pattern, name)), None)


def _belongs(reference: Path, path: Path) -> bool:
    return check_for(path.name) is not None and subject_directory(reference, path) is not None


def files(reference: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files to check, those that come later, and those that nothing covers."""
    checked: list[Path] = []
    later: list[Path] = []
    unknown: list[Path] = []
    for path in sorted(p for p in reference.rglob("*") if p.is_file()):
        name = path.relative_to(reference).as_posix()
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        if path.name not in _TEXT and any(re.fullmatch(pattern, name) for pattern in LATER):
            later.append(path)
        elif path.name in _TEXT or path.name in _RELEASED_SIZE or path.name == "config.json" or _belongs(reference, path):
            checked.append(path)
        else:
            unknown.append(path)
    return checked, later, unknown


def released_config(reference: Path) -> ModelConfig:
    """The released model's: of the config without weights, or the defaults, without a time-series tower, where there is none."""
    for path in sorted(reference.rglob("config.json")):
        if not is_checkpoint(path.parent):
            return ModelConfig.from_hf(path)
    return dataclasses.replace(ModelConfig(), time_series=None)


@functools.cache
def released_text(reference: Path) -> text.Text:
    """The tokenizer of the first directory that has its files."""
    for path in sorted(reference.rglob("merges.txt")):
        return text.Text(path.parent)
    raise ValueError(f"{reference} has no merges.txt, and so no tokenizer to compare with")


def run(reference: Path, paths: list[Path]) -> Iterator[Row]:
    """Checks files one by one. The models of a directory are kept as long as its files follow one another."""
    subject: Subject | None = None
    for path in paths:
        directory = subject_directory(reference, path) or path.parent
        if subject is None or subject.directory != directory:
            subject = Subject(directory)
        yield check_file(reference, path, subject)


def check_file(reference: Path, path: Path, subject: Subject) -> Row:
    """One file's row. What a check raises makes its row fail, and the others go on."""
    file, start = path.relative_to(reference).as_posix(), time.perf_counter()
    golden = Golden(file, {})
    try:
        golden = stored.open_safetensors(path, file) if path.suffix == ".safetensors" else Golden.open(path, file)
        if path.name in _RELEASED_SIZE:
            _RELEASED_SIZE[path.name](golden, released_config(reference))
        elif path.name in _TEXT:
            _TEXT[path.name](golden, released_text(reference))
        else:
            check = check_for(path.name)
            assert check is not None
            check(golden, subject)
        row = golden.finish()
    except Exception as error:
        row = golden.row
        where = traceback.extract_tb(error.__traceback__)[-1]
        row.problems.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    row.seconds = time.perf_counter() - start
    return row
