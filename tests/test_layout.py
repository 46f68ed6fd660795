"""The repository polices itself: who imports whom, which files there are, and that what is documented works."""

from __future__ import annotations

import ast
import functools
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configurator import ROOT, SECTIONS, SampleConfig, knobs_of, load_config, load_section

# Which of our modules each module may import. What is not in the table is not part of the architecture yet.
MAY_IMPORT = {
    "train": """startup checkpoint configurator data evaluation flops fp8 micro_step optim parallel plan precision
        profiling sharding start_report training_logger""",
    "start_report": "checkpoint configurator data flops layout micro_step parallel plan precision startup training_logger",
    "startup": """checkpoint configurator data evaluation flops fp8 hellaswag kernels layout model optim parallel
        precision pretrained profiling sharding training_logger""",
    "evaluation": "configurator data generation hellaswag model parallel precision",
    "profiling": "configurator memory parallel plan",
    "plan": "configurator data flops memory pretrained",
    "generation": "configurator model",
    "hellaswag": "configurator data kernels model parallel precision pretrained",
    "sample": "configurator data generation kernels model parallel precision pretrained",
    "hf_convert": "checkpoint checkpoint_files configurator data flops hf_format pretrained run_file visualize_training",
    "pretrained": "checkpoint configurator data hf_format kernels model",
    "hf_format": "configurator model",
    "checkpoint": "checkpoint_files configurator parallel",
    "checkpoint_files": "configurator parallel",
    "training_logger": "configurator run_file",
    "run_file": "",
    "micro_step": "configurator layout parallel precision",
    "model": "configurator kernels precision",
    "precision": "configurator kernels",
    "fp8": "configurator flops kernels parallel precision",
    "sharding": "configurator exchange layout memory optim parallel precision",
    "layout": "configurator optim parallel",
    "exchange": "configurator parallel",
    "parallel": "configurator",
    "optim": "configurator",
    "flops": "configurator",
    "memory": "configurator flops",
    "data": "configurator data",
    "configurator": "",
    "kernels": "kernels",
    "visualize_training": "run_file",
    "test_imports": "configurator flops",
}
# Packages that one place owns. The tests may import all of them.
OWNERS = {
    "torch.distributed": (
        "parallel",
        "exchange",
        "sharding",
        "checkpoint",
        "checkpoint_files",
        "benchmarks",
    ),  # a benchmark simulates it
    "triton": ("kernels",),
    "transformer_engine": ("benchmarks",),  # which runs it as a peer
    "transformers": ("hf_convert", "data", "benchmarks"),  # a benchmark runs it as a peer
}
ARCHITECTURE = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/**/*.py")]
COMMANDS = [
    path
    for path in [*ARCHITECTURE, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("flops_parameter_counting/*.py")]
    if "__main__" in path.read_text(encoding="utf-8")
]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TORCHRUN = {"nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port"}
TORCHRUN |= {"max_restarts", "nodes"}  # and sbatch


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part(path: Path) -> str:
    """The module of the table that a file belongs to: `data` for all of data/."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ARCHITECTURE, ids=relative)
def test_imports_run_down_only(path: Path) -> None:
    allowed = MAY_IMPORT[part(path)].split()
    ours = {name.split(".")[0] for name in imports(path)} & MAY_IMPORT.keys()
    assert ours - set(allowed) == set()


@pytest.mark.parametrize("path", [*ARCHITECTURE, *ROOT.glob("benchmarks/*.py")], ids=relative)
def test_packages_have_one_owner(path: Path) -> None:
    taken = {package for package in OWNERS for name in imports(path) if f"{name}.".startswith(f"{package}.")}
    assert {package for package in taken if part(path) not in OWNERS[package]} == set()


def test_the_table_has_no_cycle() -> None:
    left = {module: set(names.split()) - {module} for module, names in MAY_IMPORT.items()}
    while left:
        leaves = {module for module, names in left.items() if not names & left.keys()}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in leaves}


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def help_of(path: Path) -> tuple[str, float]:
    """What `--help` prints, and the CPU seconds that it takes: the best of up to three."""
    best_s = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd="/", timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and done.stdout, done.stderr
        best_s = min(best_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best_s < 0.5:
            break
    return done.stdout, best_s


@pytest.mark.parametrize("path", COMMANDS, ids=relative)
def test_help_is_quick(path: Path) -> None:
    text, cpu_s = help_of(path)
    assert "usage:" in text
    assert cpu_s < 0.5


def documented(pattern: str) -> list[tuple[str, str]]:
    """(document, line) of every line of a document that the pattern matches, with continued lines joined."""
    lines = [
        (relative(path), line.strip().removeprefix("$ "))
        for path in DOCUMENTS
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    ]
    return [(document, line) for document, line in lines if re.match(pattern, line)]


def arguments(line: str) -> list[str]:
    """What a shell would pass to the command of a line; config/X.py and my_*.py stand for a file of the reader's."""
    words = shlex.split(line, comments=True)
    first = next(i for i, word in enumerate(words) if word.endswith(".py")) + 1
    return [word for word in words[first:] if not re.fullmatch(r"config/X\.py|my_\w+\.py", word)]


def accepted(load: Callable[[list[str]], object], line: str) -> None:
    try:
        load(arguments(line))
    except SystemExit as done:  # --help and --print_config
        assert done.code == 0


@pytest.mark.parametrize(("document", "line"), documented(r"(python|torchrun) (.* )?train\.py\b"))
def test_documented_runs_are_accepted(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    accepted(load_config, line)


@pytest.mark.parametrize(("document", "line"), documented(r"python sample\.py\b"))
def test_documented_samples_are_accepted(document: str, line: str) -> None:
    accepted(lambda argv: load_section(argv, SampleConfig), line)


@pytest.mark.parametrize(("document", "line"), documented(r"(python \S+\.py|scripts/\S+|make \w)"))
def test_documented_commands_exist(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    else:
        assert (ROOT / (words[1] if words[0] == "python" else words[0])).is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_documents_name_options_that_exist(path: Path) -> None:
    options = set(re.findall(r"--(\w+)", " ".join(help_of(command)[0] for command in COMMANDS))) | TORCHRUN
    named = set(re.findall(r"--(\w+)=", path.read_text(encoding="utf-8")))
    assert named - options == set()


def test_knob_names_are_unique() -> None:
    n_fields = sum(len(section.__dataclass_fields__) for section in SECTIONS.values())
    assert len(knobs_of(SECTIONS)) == n_fields


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def file_tree(readme: str) -> list[str]:
    """Paths of the block behind `## Files`. A line is a name and what it is; four more spaces stand for `inside`.

    `name/` is a folder, and `<word>` in a name stands for anything.
    """
    block = re.search(r"^## Files\n.*?^```[^\n]*\n(.*?)^```", readme, flags=re.M | re.S)
    assert block, "README.md has no fenced block behind the heading '## Files'"
    paths: list[str] = []
    parents: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        depth = (len(line) - len(line.lstrip())) // 4
        parents = [*parents[:depth], line.split()[0]]
        paths.append("".join(parents))
    return [re.sub(r"<\w+>", "*", path) for path in paths]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_readme_names_the_files_there_are() -> None:
    """All of the top level, and all of every folder of which it names anything."""
    named = [name.removesuffix("/") for name in file_tree((ROOT / "README.md").read_text(encoding="utf-8"))]
    files = [Path(name) for name in tracked_files() if not name.startswith(".")]
    there = {str(path) for name in files for path in (name, *name.parents) if path != Path(".")}
    assert [name for name in named if not any(Path(path).match(name) for path in there)] == []
    opened = {str(Path(name).parent) for name in named}
    expected = {path for path in there if str(Path(path).parent) in opened}
    assert {path for path in expected if not any(Path(path).match(name) for name in named)} == set()


def test_nothing_is_put_off() -> None:
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|@[A-Z]{2,}@")
    texts = [ROOT / name for name in tracked_files() if Path(name).suffix in (".py", ".md", ".sh", ".toml", ".yml", ".txt", "")]
    assert [relative(path) for path in texts if words.search(path.read_text(encoding="utf-8"))] == []


def test_the_straight_read_stays_short() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) < 300
    presets = {relative(path): len(path.read_text().splitlines()) for path in ROOT.glob("config/*.py")}
    assert presets and {name for name, lines in presets.items() if lines > 40} == set()
