"""Structured records put into words (training_serving_evaluation.md 1.7).

A transform is a JSON file of templates. Which of several is used is decided by the record's identifier, so that a corpus is
varied, and the same whenever it is made.

    {"narrative": ["The compound {name} melts at {melting_point} K.", ...]}        records as fluent text
    {"tasks": [{"question": ..., "answer": ...}, ...], "instructions": [...]}        records as questions with descriptive answers

A template names fields in braces. `{spectrum:list}` writes a list as words, `{structure:table}` a matrix (a list of lists) or a list of
records as a table, `{energy:.3f}` a number as Python does. In a question `{instruction}` is one of the instructions.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.permutation import counter_hash, key_of
from interns1pro_jax.data.records import RejectedRecord


class Transform:
    """Templates of one file.

    Args:
      content: the file's.

    Raises:
      ConfigError: it is not of the documented form.
    """

    def __init__(self, content: bytes):
        try:
            templates = json.loads(content)
            known = set(templates) <= {"narrative", "tasks", "instructions"} and ("narrative" in templates) != ("tasks" in templates)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the transform is no JSON object ({error}).") from error
        if not known:
            raise ConfigError("a transform has either 'narrative', or 'tasks' and, where questions name them, 'instructions'.")
        self._narrative: list[str] = _strings(templates.get("narrative", []), "narrative")
        self._instructions = _strings(templates.get("instructions", []), "instructions")
        tasks = templates.get("tasks", [])
        if not all(isinstance(task, Mapping) and set(task) == {"question", "answer"} for task in tasks):
            raise ConfigError("each of 'tasks' has a question and an answer, and nothing else.")
        self._tasks: list[Mapping[str, str]] = list(tasks)
        if not self._narrative and not self._tasks:
            raise ConfigError("a transform needs at least one template.")

    def __call__(self, record: Mapping[str, Any], identifier: str) -> dict[str, Any]:
        """The record in words: a plain document or a conversation; a record without fields stays as it is.

        Raises:
          RejectedRecord: a field that a template names is absent, or cannot be written as it says.
        """
        if "fields" not in record:
            return dict(record)
        fields, rest = record["fields"], {key: value for key, value in record.items() if key != "fields"}
        if not isinstance(fields, Mapping):
            raise RejectedRecord("not a known form", "fields must be an object.")
        name = str(record.get("id", identifier))
        if self._narrative:
            return {"text": _fill(_choice(self._narrative, "narrative", name), fields), **rest}
        task = _choice(self._tasks, "task", name)
        given = {**fields, "instruction": _choice(self._instructions, "instruction", name)} if self._instructions else fields
        question, answer = _fill(task["question"], given), _fill(task["answer"], fields)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **rest}


class _Formatter(string.Formatter):
    """Fields by name only, without attributes and indices, and the two formats of this module."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if field_name not in kwargs:
            raise RejectedRecord("missing field", f"the template names {field_name!r}, the record has {sorted(kwargs)}.")
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        match format_spec:
            case "list" if isinstance(value, list) and value:
                words = [str(entry) for entry in value]
                return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
            case "table" if isinstance(value, list) and value and all(isinstance(line, list) for line in value):
                return "\n".join(f"| {' | '.join(map(str, line))} |" for line in value)
            case "table" if isinstance(value, list) and value and all(isinstance(line, Mapping) for line in value):
                columns = list(value[0])
                lines = [columns, ["---"] * len(columns), *([line.get(column, "") for column in columns] for line in value)]
                return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
            case "list" | "table":
                raise RejectedRecord("missing field", f"{value!r} cannot be written as a {format_spec}.")
        if isinstance(value, list | Mapping) or value is None:
            raise RejectedRecord("missing field", f"{value!r} has no words of its own; write it as a list or a table.")
        return super().format_field(value, format_spec)


def _fill(template: str, fields: Mapping[str, Any]) -> str:
    try:
        return _Formatter().vformat(template, (), fields)
    except ValueError as error:
        raise RejectedRecord("missing field", f"the template {template[:60]!r} cannot be filled ({error}).") from error


def _choice(options: Sequence[Any], what: str, name: str) -> Any:
    return options[int(counter_hash(key_of(what, name), np.zeros(1, np.int64))[0]) % len(options)]


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"'{what}' must be a list of strings.")
    return value
