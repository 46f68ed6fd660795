"""Knobs: precedence, origins, every accepted spelling, every refused one, and nanoGPT's own config files."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configurator import (
    ROOT,
    SECTIONS,
    SampleConfig,
    UserError,
    command_errors,
    knob_comments,
    knobs_of,
    load_config,
    load_section,
)


def write(folder: Path, text: str, name: str = "c.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_are_nanogpts():
    cfg = load_config([])
    assert (cfg.data.batch_size, cfg.model.block_size, cfg.data.gradient_accumulation_steps) == (12, 1024, 40)
    assert (cfg.optim.max_iters, cfg.optim.learning_rate, cfg.optim.min_lr, cfg.optim.warmup_iters) == (600_000, 6e-4, 6e-5, 2000)
    assert (cfg.data.dataset, cfg.run.out_dir, cfg.model.bias, cfg.model.dropout) == ("openwebtext", "out", False, 0.0)
    assert cfg.model.architecture == "12L-12H-768D-AbsPos-LN-NB-GELU-PreNorm"


def test_precedence_and_origins(tmp_path):
    one = write(tmp_path, "n_layer = 3\nn_head = 4  # four\nn_embd = 64\n", "one.py")
    two = write(tmp_path, "import math\n\n_scratch = 7\nn_head = int(math.sqrt(64))\n", "two.py")
    cfg = load_config([one, two, "--n_embd=128"])
    assert (cfg.model.n_layer, cfg.model.n_head, cfg.model.n_embd, cfg.model.block_size) == (3, 8, 128, 1024)
    assert cfg.origins["n_layer"] == f"{one}:1" and cfg.origins["n_head"] == f"{two}:4"
    assert cfg.origins["n_embd"] == "command line" and cfg.origins["block_size"] == "default"


@pytest.mark.parametrize(
    ("argv", "knob", "value"),
    [
        (["--max_iters=1e6"], "max_iters", 1_000_000),
        (["--max_iters", "7"], "max_iters", 7),
        (["--grad_clip=1"], "grad_clip", 1.0),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--bias"], "bias", True),
        (["--bias", "--seed=3"], "bias", True),
        (["--bias=0"], "bias", False),
        (["--bias", "False"], "bias", False),
        (["--cuda_graph", "none"], "cuda_graph", None),
        (["--cuda_graph"], "cuda_graph", True),
        (["--compile=false"], "compile", False),
        (["--max_hours=none"], "max_hours", None),
        (["--max_hours=2"], "max_hours", 2.0),
        (["--sample_prompt=a=b"], "sample_prompt", "a=b"),
        (["--sample_prompt", "-x"], "sample_prompt", "-x"),
        (["--eval_freq=10"], "eval_interval", 10),
        (["--checkpoint_freq=10"], "checkpoint_interval", 10),
        (["--resume", "latest"], "init_from", "resume"),
        (["--dtype=bfloat16"], "dtype", "bfloat16"),
        (["--max_iters=1", "--max_iters=2"], "max_iters", 2),
    ],
)
def test_accepted_spellings(argv, knob, value):
    got = load_config(argv).values()[knob]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("n_layer = 1\nn_layers = 2\n", 2, "did you mean 'n_layer'"),
        ("\nn_layer = 'twelve'\n", 2, "'twelve' is not an int"),
        ("n_layer = True\n", 1, "is not an int"),
        ("n_layer = 2.5\n", 1, "is not an int"),
        ("bias = 3\n", 1, "True or False"),
        ("dataset = 5\n", 1, "is not a str"),
        ("norm_position = 'Pre'\n", 1, "did you mean pre"),
        ("x = (\n", 1, "not a Python config file"),
        ("a_ = 1\nlearning_rate = 1 / 0\n", 2, "ZeroDivisionError"),
        ("learning_rate = float('nan')\n", 1, "is not a float"),
        ("n_embd = 64\nn_head = 5\n", 2, "n_head=5 does not divide n_embd=64; the nearest that do: 4 and 8"),
        ("n_head = 6\nn_embd = 768\nn_kv_head = 4\n", 3, "n_kv_head=4 does not divide n_head=6"),
        ("dropout = 1.0\n", 1, "must be in [0, 1)"),
        ("batch_size = 0\n", 1, "must be greater than 0"),
        ("eval_interval = -1\n", 1, "must not be negative"),
        ("learning_rate = 1e-5\n", 1, "min_lr"),
        ("device = 'gpu'\n", 1, "is not one of auto, cpu"),
        ("init_from = 'gpt5'\n", 1, "'gpt5' is not scratch, resume, gpt2"),
        ("run_name = 'a/b'\n", 1, "slash"),
        ("n_layer = 10**400\n", 1, "is not an int"),
        ("seed = 2**63\n", 1, "must be below 2**63"),
        ("n_layer = 2\nraise SystemExit\n", 2, "SystemExit"),
        ("n_layer = 2\0\n", 1, "not a Python config file"),
        ("if True:\n    n_layer = 2\nn_layer = 'x'\n", 3, "is not an int"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(tmp_path, text, line, says):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_config([path])
    assert f"{path}:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--n_layers=3"], "--n_layers: unknown knob 'n_layers'; did you mean 'n_layer'?"),
        (["--max_iters"], "--max_iters: needs a value, such as --max_iters=600000"),
        (["--max_iters", "--bias"], "--max_iters: needs a value"),
        (["--resume"], "--resume: needs a value: latest, best, "),
        (["--max_iters=1.5"], "--max_iters: max_iters='1.5' is not an int"),
        (["--bias=maybe"], "bias='maybe' is not a bool, such as True or False"),
        (["--fsdp_accumulate_whole=maybe"], "is not a bool or none, such as True, False or none"),
        (["--no-compile"], "--no-compile: unknown knob 'no-compile'; did you mean --compile=False?"),
        (["--no_decay-lr"], "did you mean --decay_lr=False?"),
        (["--no_layer=3"], "did you mean 'n_layer'?"),
        (["--max_iters=inf"], "is not an int"),
        (["--n_head=7"], "--n_head: n_head=7 does not divide n_embd=768; the nearest that do: 6 and 8"),
        (["--fp8_margin=2000"], "--fp8_margin: fp8_margin=2000 must be 0 to 8, of the 18 binary digits"),
        (["--fp8_margin=9"], "--fp8_margin: fp8_margin=9 must be 0 to 8"),
        (["--fp8_margin=-1"], "--fp8_margin: fp8_margin=-1 must be 0 to 8"),
        (["config/quikstart.py"], "did you mean config/quickstart.py?"),
    ],
)
def test_mistakes_on_the_command_line(argv, says):
    with pytest.raises(UserError, match=re.escape(says)):
        load_config(argv)


def test_all_problems_at_once(tmp_path):
    path = write(tmp_path, "n_layers = 1\nbias = 'x'\n")
    with pytest.raises(UserError) as caught:
        load_config([path, "missing.py", "--dropuot=1", "--max_iters=x", "--batch_size=0"])
    assert len(str(caught.value).splitlines()) == 6


def test_a_config_file_cannot_reach_the_program(tmp_path):
    path = write(tmp_path, "ROOT = 1\n")
    with pytest.raises(UserError, match="unknown knob 'ROOT'"):
        load_config([path])
    assert isinstance(ROOT, Path)


def test_warmup_may_exceed_max_iters():
    assert load_config(["--max_iters=100"]).optim.warmup_iters == 2000


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["config/full_llama_1.36b.py"]).model.architecture == "18L-18H-2304D-RoPE-RMS-SwiGLU-PreNorm"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_presets_load_and_are_short(path):
    load_config([str(path)])
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("arch_gpt2", "12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm"),
        ("arch_llama", "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"),
        ("arch_team", "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"),
        ("arch_custom", "12L-12H-768D-RoPE-LN-GELU-PreNorm"),
        ("full_gpt2_1.36b", "18L-19H-2432D-AbsPos-LN-NB-GELU-PreNorm"),
    ],
)
def test_architecture_names(preset, name):
    assert load_config([f"config/{preset}.py"]).model.architecture == name


# What nanoGPT's five config files set, with the habits they have: an import, a call in a value, arithmetic.
NANOGPT = {
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
batch_size, block_size = 12, 1024
gradient_accumulation_steps = 5 * 8
max_iters = lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
    "eval_gpt2": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
    "finetune_shakespeare": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_configs_are_accepted(tmp_path, name):
    cfg = load_config([write(tmp_path, NANOGPT[name])])
    if name == "train_gpt2":
        assert cfg.data.batch_size * cfg.data.gradient_accumulation_steps * cfg.model.block_size == 491_520
        assert (cfg.log.wandb_run_name, cfg.optim.lr_decay_iters) == ("gpt2-124M", 600_000)
    if name == "train_shakespeare_char":
        assert (cfg.model.n_embd, cfg.optim.beta2, cfg.checkpoint.always_save_checkpoint) == (384, 0.99, False)


def test_imports_and_functions_in_a_config_are_no_knobs(tmp_path):
    text = "import time\ndef double(x): return 2 * x\nwandb_run_name = 'ft-' + str(time.time())\nseed = double(4)\n"
    cfg = load_config([write(tmp_path, text)])
    assert cfg.run.seed == 8 and cfg.log.wandb_run_name.startswith("ft-")


def test_a_file_that_starts_with_a_byte_order_mark(tmp_path):
    assert load_config([write(tmp_path, "\ufeffn_layer = 3\n")]).model.n_layer == 3


def test_every_knob_has_a_comment():
    knobs = [*knobs_of(SECTIONS).values(), *knobs_of({"sample": SampleConfig}).values()]
    assert knob_comments().keys() >= {(knob.owner, knob.name) for knob in knobs}


def run_train(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, text=True, timeout=60)


def test_help_is_quick_and_complete():
    spans_s = []
    for _ in range(3):
        t0_s = time.perf_counter()
        done = run_train("--help")
        spans_s.append(time.perf_counter() - t0_s)
    assert done.returncode == 0 and all(f"--{name}=" in done.stdout for name in knobs_of(SECTIONS))
    assert min(spans_s) < 0.5
    assert "--seed=1337 (int)\n        of initialisation, sample order and dropout\n" in done.stdout


def test_print_config_is_a_config_file(tmp_path):
    first = run_train("config/quickstart.py", "--seed=5", "--print_config")
    assert "seed = 5  # command line" in first.stdout and re.search(r"n_layer = 4  # config/quickstart.py:\d+", first.stdout)
    again = run_train(write(tmp_path, first.stdout), "--print_config")
    assert re.sub(r"  #.*", "", again.stdout) == re.sub(r"  #.*", "", first.stdout)


def test_small_commands_print_their_knobs_too(capsys):
    with pytest.raises(SystemExit) as caught:
        load_section(["--top_k=5", "--print_config"], SampleConfig)
    assert caught.value.code == 0 and "top_k = 5  # command line\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sample.py", "hellaswag.py"])
def test_the_help_of_a_small_command_is_its_knobs_alone(name):
    done = subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--out_dir='out' (str)\n" in done.stdout
    assert "Config\n" not in done.stdout and "aliases" not in done.stdout


PRINTS = "from configurator import run_command; run_command(lambda argv: print('caf\u00e9'))"


def test_what_a_terminal_cannot_show_is_escaped():
    env = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n"), done.stderr


def test_output_may_be_closed():
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(PRINTS)} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mistake_is_one_message_and_exit_2():
    done = run_train("--n_layers=3", "--n_head=7")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --n_layers: unknown knob") and "Traceback" not in done.stderr


NEED_PACKAGES = ["train.py", "train.py --plan", "sample.py", "hellaswag.py", "visualize_training.py"]
NEED_PACKAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("data/*/prepare.py"))


@pytest.mark.parametrize("command", NEED_PACKAGES)
def test_a_python_without_packages_is_told_what_to_install(command):
    bare = [sys.executable, "-E", "-S", *command.split()]  # without site-packages
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("error: this Python has no (PyTorch|numpy): run `make quickstart` once, then .+\n", done.stderr)


@pytest.mark.parametrize("module", ["kernels.lost", "numpy.lost"])
def test_a_missing_module_that_nobody_can_install_keeps_its_traceback(module):
    with pytest.raises(ModuleNotFoundError), command_errors():
        importlib.import_module(module)
