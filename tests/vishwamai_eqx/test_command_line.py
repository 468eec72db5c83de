"""Settings: what is refused, with which sentence, before anything is compiled; and what is saved is read back."""

import dataclasses
import json
import re

import pytest

import generate
import train
from tests.histories import text
from vishwamai_eqx import command_line, saved_config
from vishwamai_eqx.config import PRESETS, Config, from_dict, to_dict
from vishwamai_eqx.tokenizer import VishwamAITokenizer
from vishwamai_eqx.validation import problems

REFUSED = [
    ("--stepz 3", "--stepz is not a setting; take --steps."),
    ("--preset tine", "preset='tine' must be one of tiny, base, large; take tiny."),
    ("--steps", "--steps needs a value; give one after it."),
    ("--steps x", "steps='x' must be a whole number; take a number."),
    ("--steps 1e3", "steps='1e3' must be a whole number; take 1000."),
    ("--steps 3 4", "--steps takes one value and got 2: '3 4'; quote a value with spaces."),
    ("--model.remat fulll", "model.remat='fulll' must be one of none, dots, inputs, full; take full."),
    ("--attention flash", "attention='flash' must be one of auto, reference, xla, pallas_tpu; take "),
    ("--foo", "--foo is not a setting; take --help for all of them."),
    ("--json", "json=True must be given with dry_run, of which it is a form; take both."),
    ("--dry-run --replay 3", "replay=3 must be given without dry_run, which computes nothing; take one of them."),
    ("--model.vocab-size 1", "model.vocab_size=1 must be at least 260; take 260."),
    ("--mesh data=1,data=2", "mesh='data=1,data=2' must name each axis once and names data again; take data=1."),
    ("--json=3", "--json takes no value and got '3'; leave the value out."),
    ("--optim.learning-rate big", "optim.learning_rate='big' must be a number; take one such as 0.1."),
    ("--mesh data=9", "mesh='data=9' must be of at most the 8 devices there are and needs 9; take data=8."),
    (
        "--mesh dada=2",
        "mesh='dada=2': 'dada=2' must be AXIS=SIZE with an axis of replica, data, expert, model; take data=8.",
    ),
    ("--model.num-kv-heads 3", "model.num_kv_heads=3 must be a divisor of num_heads=2; take "),
    ("--model.num-heads 7", "model.num_heads=7 must be such that hidden_size="),
    ("--model.experts-per-token 9", "model.experts_per_token=9 must be at most num_experts=8; take 8."),
    ("--steps 0", "optim.steps=0 must be at least 1; take 1."),
    ("--data.held-out-share 1.5", "data.held_out_share=1.5 must be above 0 and below 1; take 0.05."),
    ("--optim.microbatches 3", "optim.microbatches=3 must be a divisor of batch_size=8; take "),
    (
        "--optim.batch-size 12",
        "optim.batch_size=12 must be a multiple of microbatches=1 times the mesh's replica * data * expert = 8; take ",
    ),
    ("--model.dropout-rate 1", "model.dropout_rate=1.0 must be at least 0 and below 1; take 0.0."),
    ("--model.rope-theta nan", "model.rope_theta=nan must be at least 1 and at most 1e30; take 10000.0."),
    ("--model.rope-theta 1e-300", "model.rope_theta=1e-300 must be at least 1 and at most 1e30; take 10000.0."),
    ("--model.max-seq-len 1", "model.max_seq_len=1 must be at least 2; take 2."),
    ("--mesh data=\u0663", "mesh='data=\u0663': 'data=\u0663' must be AXIS=SIZE"),
    ("--data.weights x", "data.weights='x' must be a number"),
    ("--data a.txt --data.weights nan", "data.weights=(nan,) must be a number above 0 for each of 1 globs"),
    ("--preset", "--preset needs a value"),
    ("--attention pallas_tpu", "model.attention='pallas_tpu' must be an implementation that runs on cpu; take auto"),
    ("--experts pallas_tpu", "model.experts='pallas_tpu' must be an implementation that runs on cpu; take auto"),
    ("--run-dir=", "run_dir='' must be a folder's name"),
    ("--run-dir /dev/null/x", "run_dir='/dev/null/x' must be a folder's or a new one's, and /dev/null is a file"),
    ("--run-dir runs/what?", "run_dir='runs/what?': no folder of its path may have ? in its name"),
    ("--data nowhere/*.txt", "data.files='nowhere/*.txt'"),
    ("--tokenizer nowhere.model", "nowhere.model"),
    ("--data a.txt --data b.txt", "--data is given twice; give all its values after one of them."),
    ("--processes.count 2", "processes.count=2 means nothing without processes.address; give it HOST:PORT, or auto."),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_refusals_are_sentences_and_exit_code_2(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_step", None)  # nothing gets that far
    assert train.main(arguments.split()) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, generate])
def test_help_fits_a_terminal_and_keeps_its_examples_apart(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    # Usage begins with the program's name, which here would be that of pytest.
    monkeypatch.setattr("sys.argv", [f"{program.__name__}.py"])
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and max(map(len, lines)) <= 80
    assert sum(line.startswith("    python ") for line in lines) >= 2


def refused(arguments, capsys):
    """What each line of the refusal begins with: a setting's name, where it is one that is at fault."""
    assert train.main(arguments.split()) == 2
    return [line.partition("=")[0] for line in capsys.readouterr().err.splitlines()]


def test_all_mistakes_at_once(capsys):
    assert train.main(["--stepz", "3", "--steps", "x", "--model.remat", "all"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert train.main(["--model.num-kv-heads", "3", "--mesh", "data=9"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    # What means nothing hides nothing of the rest; one mistake is one line.
    mistakes = "--stepz 3 --steps x --optim.batch-size 7 --optim.microbatches 2 --mesh ,"
    assert refused(mistakes, capsys) == [
        "--stepz is not a setting; take --steps.",
        "steps",
        "optim.microbatches",
        "mesh",
    ]
    # What is impossible by itself, what two settings are to each other, and each part of a mesh.
    mistakes = "--optim.eps 0 --optim.microbatches 0 --model.num-kv-heads 3 --mesh data=x,expert=2,expert=2"
    assert refused(mistakes, capsys) == [
        "optim.microbatches",
        "optim.eps",
        "model.num_kv_heads",
        "mesh",
        "mesh",
    ]


def test_a_run_of_another_configuration_is_refused(tmp_path, capsys):
    config = dataclasses.replace(PRESETS["tiny"], run_dir=tmp_path)
    saved_config.write(config)
    assert train.main(["--run-dir", str(tmp_path), "--model.num-layers", "5"]) == 2
    assert re.search(r"another configuration: model.num_layers=5 must be \d", capsys.readouterr().err)
    # Of another preset most settings differ, and its name says it.
    assert train.main(["--run-dir", str(tmp_path), "--preset", "base"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "another configuration: preset='base' must be 'tiny' as it was saved" in sentence
    # What is only looked at may change, and what is not given comes from the run.
    again = command_line.parse(["--run-dir", str(tmp_path), "--checkpoint.every", "7", "--eval.every", "3"])
    assert again.checkpoint.every == 7
    assert again.model == config.model
    (tmp_path / "config.json").write_text('{"model": {"layers": 3}}')
    assert train.main(["--run-dir", str(tmp_path)]) == 2
    assert "config.json: not a configuration of this version" in capsys.readouterr().err


def test_every_field_can_be_set():
    flags = command_line.flags(Config)
    for flag in ("--run-dir", "--data", "--steps", "--attention", "--model.num-layers", "--checkpoint.every"):
        assert flag in flags
    config = command_line.parse(
        ["--steps", "7", "--data", "a.txt", "b.md", "--attention", "xla", "--model.no-tie-embeddings"]
    )
    assert (config.optim.steps, config.data.files) == (7, ("a.txt", "b.md"))
    assert (config.model.attention, config.model.tie_embeddings) == ("xla", False)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_possible_and_read_back(preset):
    config = PRESETS[preset]
    assert problems(config, 1) == problems(config, 8) == []
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_dry_run_prints_totals(capsys):
    assert train.main(["--preset", "base", "--dry-run"]) == 0
    assert "1,497,589,248 parameters, 478,373,376 of them active" in capsys.readouterr().out
    assert train.main(["--preset", "base", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == {"total": 1_497_589_248, "active": 478_373_376}


def test_a_run_that_cannot_be_written_is_refused_before_a_tokenizer_is_trained(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_config, "TemporaryFile", full)
    monkeypatch.setattr(VishwamAITokenizer, "train", lambda *_: pytest.fail("the tokenizer is trained"))
    assert train.main(["--run-dir", str(tmp_path / "run"), "--data", text(tmp_path)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("run_dir=") and "cannot be written: [Errno 28] No space left on device; take" in sentence
