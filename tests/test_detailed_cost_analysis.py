"""The cost analysis as a user runs it, from any folder, and the files that it reads."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ROOT, UserError, load_config
from flops import HOFFMANN, count_parameters, flops_per_token
from hf_format import config_json

FOLDER = ROOT / "flops_parameter_counting"
spec = importlib.util.spec_from_file_location("detailed_cost_analysis", FOLDER / "detailed_cost_analysis.py")
analysis = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = analysis
spec.loader.exec_module(analysis)

MODELS = {"llama_1.36b": "full_llama_1.36b", "gpt2_1.36b": "full_gpt2_1.36b"}
LAW = "configs/scaling_laws/custom/verify_llama_1.36b.jsonc"


def output(capsys: pytest.CaptureFixture, *argv: str, code: int = 0) -> str:
    assert analysis.main(list(argv)) == code
    return capsys.readouterr().out


def written(folder: Path, text: str) -> Path:
    path = folder / "file.jsonc"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_the_presets(name):
    model = analysis.read_model(FOLDER / f"configs/models/{name}.json")
    preset = load_config([f"config/{MODELS[name]}.py"]).model
    assert (count_parameters(model), flops_per_token(model)) == (count_parameters(preset), flops_per_token(preset))


def test_a_config_json_of_hugging_face(tmp_path):
    preset = load_config(["config/full_llama_1.36b.py"]).model
    theirs = analysis.read_model(written(tmp_path, json.dumps(config_json(preset))))
    assert (count_parameters(theirs), flops_per_token(theirs)) == (count_parameters(preset), flops_per_token(preset))


def test_a_folder_of_hugging_face(tmp_path, capsys):
    preset = load_config(["config/full_llama_1.36b.py"]).model
    with pytest.raises(UserError, match=r"a folder without a config\.json"):
        analysis.find(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config_json(preset)))
    assert f"{count_parameters(preset).total:,}" in output(capsys, f"--model_config={tmp_path}")


@pytest.mark.parametrize("name", MODELS)
def test_components_add_up(name, capsys):
    text = output(capsys, f"--model_config=configs/models/{name}.json")
    rows = re.findall(r"^(\S.*?) {2,}([\d,]+) +[\d.]+% *([\d,]+) +[\d.]+%$", text, re.M)
    *parts, total = [[int(figure.replace(",", "")) for figure in row[1:]] for row in rows]
    assert len(parts) == 7
    assert [sum(column) for column in zip(*parts, strict=True)] == total


def test_the_documented_law_holds_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "detailed_cost_analysis.py", "--scaling_law", LAW]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "expected 1.294e+09: agrees" in done.stdout and "expected 2.37: agrees" in done.stdout


def test_what_does_not_agree_exits_with_1(tmp_path: Path, capsys) -> None:
    path = written(tmp_path, '{"parameters": 1.294e9, "tokens": 6e9, "expected": {"loss": 2.37}}')
    assert "loss          2.76" in (text := output(capsys, "--scaling_law", str(path), code=1))
    assert "DOES NOT AGREE" in text


@pytest.mark.parametrize("compute", [1e18, 7.09e20, 1e24])
def test_the_inversion_is_the_minimum(compute):
    n, d = HOFFMANN.best_split(compute)
    assert 6 * n * d == pytest.approx(compute)
    best = HOFFMANN.loss(n, d)
    assert all(HOFFMANN.loss(n * factor, d / factor) > best for factor in (0.5, 0.99, 1.01, 2))


def test_a_budget_alone(capsys):
    text = output(capsys, "--compute_budget=5.76e23")  # Gopher's: equation 4 with the constants of equation 10
    n, d = (float(figure) for figure in re.search(r"N = (\S+), D = (\S+),", text).groups())
    assert 6 * n * d == pytest.approx(5.76e23, rel=1e-3)
    assert 20e9 < n < 80e9


@pytest.mark.parametrize("budget", ["nan", "inf", "-1"])
def test_a_budget_that_is_no_number(budget, capsys):
    with pytest.raises(SystemExit) as exit:
        analysis.main([f"--compute_budget={budget}"])
    says = f"error: --compute_budget={float(budget)} must be a number greater than 0"
    assert exit.value.code == 2 and says in capsys.readouterr().err


def test_only_the_number_that_is_wrong_is_named(capsys):
    with pytest.raises(SystemExit):
        analysis.main(["--model_config=configs/models/llama_1.36b.json", "--num_gpus=0"])
    assert capsys.readouterr().err.endswith("error: --num_gpus=0 must be a number greater than 0\n")


def test_a_gpu_that_is_several_and_a_peak_that_is_no_sum(capsys):
    text = output(capsys, "--model_config=configs/models/llama_1.36b.json", "--gpu=A100")
    assert "\nA100 is taken as A100-SXM4-40GB; also known: A100-SXM4-80GB, " in text
    assert "\nparts add to more than the peak because" in text


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{\n  // fine\n  "n_layer": 2,\n  "n_head": \n}', 5, 1),
        ('{"a": 1 /* over\ntwo lines */ "b": 2}', 2, 14),
        ('{\n  "n_layer": 2,\n}', 3, 1),
        ('{"path": "http://x", // a comment\n oops}', 2, 2),
    ],
)
def test_malformed_json_names_line_and_column(text, line, column, tmp_path):
    with pytest.raises(UserError) as error:
        analysis.read_json(written(tmp_path, text))
    found = re.search(r"line (\d+), column (\d+)", str(error.value))
    assert [int(figure) for figure in found.groups()] == [line, column] or int(
        found[1]
    ) == line - 1  # Python 3.13 names the comma


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"n_layer": 2, // yes\n}', "take the comma away"),
        ('{"a": [1, 2, ]}', "take the comma away"),
        ('{"a": 1 /* open', "close it with */"),
        ('{"a": 1} /* open "b", }', "close it with */"),
        ("{ /* open }", "close it with */"),
        ('{"a": ,}', "Expecting value"),
    ],
)
def test_malformed_json_says_what_to_do(text, says, tmp_path):
    with pytest.raises(UserError, match=rf"line \d, column \d+: .*{re.escape(says)}"):
        analysis.read_json(written(tmp_path, text))


def test_comments_are_no_part_of_strings(tmp_path):
    text = '{"a": "http://x /* no */ \\" // no", /* yes */ "b": 1 // yes\n}'
    assert analysis.read_json(written(tmp_path, text)) == {"a": 'http://x /* no */ " // no', "b": 1}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"n_layers": 2, "vocab_size": 10}, "unknown knob 'n_layers'; did you mean 'n_layer'?"),
        ({"n_layer": "two", "vocab_size": 10}, "n_layer='two' is not an int"),
        ({"n_head": 5, "vocab_size": 10}, "n_head=5 does not divide n_embd=768"),
        ({"n_layer": 2}, "vocab_size is needed"),
        (
            {"model_type": "gpt2", **dict.fromkeys(("n_layer", "n_embd", "n_positions", "vocab_size"), 8), "n_head": 0},
            "n_head=0 must",
        ),
    ],
)
def test_a_model_that_cannot_be(values, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        analysis.read_model(written(tmp_path, json.dumps(values)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tokns": 1}, "tokns is not one of"),
        ({"law": {"E": 0}}, "law.E=0 is not a number greater than 0"),
        ({"law": 3}, "law must be an object"),
        ({"tokens": math.inf}, "tokens=inf is not a number greater than 0"),
        ({"expected": {"los": 2}}, "expected.los is not one of parameters, loss"),
        ({"model_config": "nowhere.json"}, "nowhere.json: no such file; .*configs/models/llama_1.36b.json"),
    ],
)
def test_a_question_that_cannot_be(values, says, tmp_path):
    with pytest.raises(UserError, match=says):
        analysis.read_question(written(tmp_path, json.dumps(values)))


@pytest.mark.parametrize(
    ("value", "expected", "agrees"),
    [(2.3749, 2.37, True), (2.3751, 2.37, False), (1.2944e9, 1.294e9, True), (1.2946e9, 1.294e9, False), (math.pi, 3.0, True)],
)
def test_expectations_hold_to_the_digits_given(value, expected, agrees):
    assert analysis.rounds_to(value, expected) is agrees
