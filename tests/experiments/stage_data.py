"""Real data that is there wherever the tests run: documentation of Python's library, and what comes with Matplotlib: a photograph, an
electroencalogram and a recording of a membrane."""

import inspect
import json
import statistics
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.formats import RecordReader
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.preparation import PreparationConfig, write_documents
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer

SAMPLES = Path(matplotlib.get_data_path()) / "sample_data"
MODULES = (statistics, inspect, json, textwrap)


def functions():
    """Documented functions of the library, with their documentation."""
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__doc__ and not name.startswith("_"):
                yield f"{module.__name__}.{name}", inspect.cleandoc(function.__doc__)[:400]


def media(directory: Path) -> tuple[dict, dict]:
    """Items of messages: a photograph, small, and two channels of an electroencephalogram."""
    with Image.open(SAMPLES / "grace_hopper.jpg") as photograph:
        photograph.resize((64, 64)).save(directory / "photograph.png")
    np.save(directory / "eeg.npy", np.fromfile(SAMPLES / "eeg.dat", float).reshape(800, 4)[:60, :2].astype(np.float32))
    return (
        {"type": "image_url", "image_url": {"url": "photograph.png"}},
        {"type": "time_series_url", "time_series_url": {"url": "eeg.npy", "sampling_rate": 10.0}},
    )


def records(directory: Path) -> dict[str, list[dict]]:
    """Records of text, interleaved images, signals, and conversations with reasoning, tools and media."""
    image, signal = media(directory)
    documents = [{"text": f"{name}\n{text}"} for name, text in functions()]
    words = "Rear Admiral Grace Hopper, who wrote the first linker and led the work on COBOL."
    heard = "An electroencephalogram: two electrodes, in microvolts, for six seconds."
    times = [1.75, 2.5, 3.25]
    tool = {
        "type": "function",
        "function": {"name": "mean", "description": "The mean of data.", "parameters": {"type": "object"}},
    }
    call = {"type": "function", "function": {"name": "mean", "arguments": {"data": times}}}
    chat = [
        [
            {"role": "user", "content": f"What does {name} do?"},
            {"role": "assistant", "reasoning_content": f"It is in {name}.", "content": text},
        ]
        for name, text in list(functions())[:12]
    ]
    shown = [image, signal, {"type": "text", "text": "Who and what are these?"}]
    chat += [[{"role": "user", "content": shown}, {"role": "assistant", "content": f"{words} {heard}"}]] * 12
    conversations = [{"messages": messages} for messages in chat]
    conversations.append(
        {
            "messages": [
                {"role": "user", "content": f"What is the mean of {times}?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(statistics.mean(times))},
                {"role": "assistant", "content": f"It is {statistics.mean(times)}."},
            ],
            "tools": [tool],
        }
    )
    return {
        "text": documents[::2],
        "science": documents[1::2],
        "image_text": [
            {"content": [image, {"type": "text", "text": words}]},
            *[{"content": [image, {"type": "text", "text": words}, signal, {"type": "text", "text": heard}]}] * 6,
        ],
        "signals": [{"content": [signal, {"type": "text", "text": heard}]}] * 4,
        "chat": conversations,
    }


def prepare(directory: Path, tokenizer: ScientificTokenizer, model: ModelConfig, bounds: PixelBounds) -> None:
    """Prepared sources of all of it, and one of each kind held out."""
    encoder = DocumentEncoder(tokenizer, model, bounds)
    made = records(directory)
    made["held_out"] = [made[kind][0] for kind in ("text", "image_text", "signals", "chat")]
    for name, content in made.items():
        reader = RecordReader(source=name, base=str(directory), vision=model.vision)
        documents = [reader.document(record, f"{name}-{number}") for number, record in enumerate(content)]
        write_documents(str(directory / name), documents, PreparationConfig("documents", row=None), encoder)
