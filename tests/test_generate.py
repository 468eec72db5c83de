"""`generate.py` and `vishwamai_eqx.load`: a run, its export, and a Gemma folder write the same way."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
import train
import vishwamai_eqx
from tests.histories import SETTINGS, text
from vishwamai_eqx import command_line, export, gemma, manifest
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.tokenizer import VishwamAITokenizer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    corpus, run = text(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("runs") / "run"
    own = ["--steps=3", "--optim.batch-size=8", "--mesh=data=1", "--eval.every=3"]
    assert train.main(["--run-dir", str(run), "--data", corpus, *SETTINGS, *own]) == 0
    return run


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export.main([str(run_dir), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def gemma_dir(run_dir, tmp_path_factory):
    """A random Gemma with a tokenizer, and more embeddings than pieces."""
    folder = tmp_path_factory.mktemp("gemma") / "model"
    kinds = ("sliding_attention", "full_attention")
    config = GemmaConfig("gemma2", 448, 32, 48, 2, 4, 2, 16, max_position_embeddings=64, layer_types=kinds)
    gemma.save(gemma.Gemma(gemma.Decoder(config, key=jax.random.key(0))), folder)
    shutil.copy(run_dir / "tokenizer" / "tokenizer.model", folder)
    return folder


def written(capsys, *arguments):
    """What `generate.py --json` prints."""
    capsys.readouterr()
    assert generate.main(["--prompt", "abc", "--max-new-tokens", "9", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_export_gives_the_run_s_logits_to_the_last_bit(run_dir, exported):
    tokens = np.random.default_rng(0).integers(4, 400, (2, 64), dtype=np.int32)
    tokens = jnp.asarray(tokens)
    forward = jax.jit(lambda model: model.head(model(tokens)[0]))
    for cast in (True, False):
        models = [vishwamai_eqx.load(folder, cast=cast).model for folder in (run_dir, exported)]
        assert jax.tree.structure(models[0]) == jax.tree.structure(models[1])
        np.testing.assert_array_equal(*map(forward, models))


def test_an_export_says_what_it_is(run_dir, exported):
    card = (exported / "README.md").read_text()
    assert manifest.read(run_dir / "checkpoints" / "3")["fingerprints"]["data"] in card
    assert "| steps | 3 of 8 rows of 64 tokens |" in card and "held-out bits per byte | " in card
    assert "not measured" not in card
    assert vishwamai_eqx.load(exported).tokenizer.fingerprint == vishwamai_eqx.load(run_dir).tokenizer.fingerprint


def test_an_export_overwrites_nothing_and_has_one_state(run_dir, exported, capsys):
    assert export.main([str(run_dir), str(exported)]) == 2
    assert "must be empty or new" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step=3: .* exported model, which has one state; leave it out"):
        vishwamai_eqx.load(exported, step=3)


def test_a_damaged_export_is_refused(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        vishwamai_eqx.load(folder)


def test_a_run_and_its_export_write_the_same(run_dir, exported, capsys):
    first, second = (written(capsys, "--run-dir", folder) for folder in (run_dir, exported))
    assert first["samples"] == second["samples"] and len(first["samples"][0]["tokens"]) == 9


def test_gemma_writes(gemma_dir, capsys):
    sampled = written(capsys, "--model", gemma_dir, "--num-samples", 2)
    assert [len(sample["tokens"]) for sample in sampled["samples"]] == [9, 9]
    assert sampled["samples"] == written(capsys, "--model", gemma_dir, "--num-samples", 2)["samples"]


def test_a_tokenizer_of_more_pieces_than_embeddings_is_refused(gemma_dir, tmp_path, capsys):
    folder = tmp_path / "model"
    gemma.save(gemma.load("tests/parity/gemma/gemma"), folder)
    shutil.copy(gemma_dir / "tokenizer.model", folder)
    assert generate.main(["--model", str(folder), "--prompt", "abc"]) == 2
    assert "400 pieces, but config.json says vocab_size=96; take both from the same model" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_refused(capsys):
    assert generate.main(["--model", "tests/parity/gemma/gemma", "--prompt", "abc"]) == 2
    assert "tokenizer.model" in capsys.readouterr().err


@pytest.mark.parametrize("pieces", [400, 420])
def test_an_exchanged_tokenizer_is_refused(run_dir, exported, tmp_path, pieces, capsys):
    """One of as many pieces fits an export's embedding, which keeps no fingerprint."""
    text(tmp_path)
    other = VishwamAITokenizer.train(
        [path.read_text().upper() for path in tmp_path.glob("*.txt")], pieces, tmp_path / "other"
    )
    for number, folder in enumerate((run_dir, exported)[: 1 if pieces == 400 else 2]):
        copied = shutil.copytree(folder, tmp_path / str(number))
        other.save(copied / "tokenizer")
        assert generate.main(["--run-dir", str(copied), "--prompt", "abc"]) == 2
        assert "the run's tokenizer has been exchanged; put its own back" in capsys.readouterr().err


def test_all_mistakes_at_once(capsys):
    given = {"temperature": -1.0, "top_k": -1, "top_p": 2.0, "num_samples": 0, "max_new_tokens": 0, "seed": -1}
    given |= {"min_p": -1.0, "repetition_penalty": 0.0, "rows": 0, "lookup": -1}
    assert generate.main([f"--{name.replace('_', '-')}={value}" for name, value in given.items()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert {line.partition(" must be ")[0] for line in lines} == {f"{name}={value}" for name, value in given.items()}


@pytest.mark.parametrize(("name", "value", "nearest"), [("seed", 2**31, 2**31 - 1), ("num-samples", 10**11, 4096)])
def test_a_seed_that_another_would_repeat_and_more_samples_than_fit_are_refused(name, value, nearest, capsys):
    assert generate.main(["--prompt", "abc", f"--{name}={value}"]) == 2
    assert f"at most {nearest}; take {nearest}." in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error_to_speak_of(run_dir):
    command = [sys.executable, "generate.py", "--run-dir", str(run_dir), "--prompt", "abc", "--max-new-tokens", "50"]
    with subprocess.Popen(
        command, cwd=Path(generate.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "prompt"), [([], None), (["--prompt", "None"], "None"), (["--prompt=-1"], "-1"), (["--prompt="], "")]
)
def test_a_prompt_is_taken_by_the_letter(arguments, prompt):
    assert command_line.parse_settings(generate.Settings, arguments, generate.Settings(), None).prompt == prompt


def test_guesses_change_no_text(run_dir, capsys):
    plain = written(capsys, "--run-dir", run_dir, "--num-samples", 3, "--logprobs")
    assert len(plain["samples"][0]["logprobs"]) == 9
    assert written(capsys, "--run-dir", run_dir, "--num-samples", 3, "--lookup", 3, "--rows", 2, "--logprobs")[
        "samples"
    ] == [{**sample, "logprobs": pytest.approx(sample["logprobs"], abs=1e-4)} for sample in plain["samples"]]


def test_a_batch_goes_on_where_it_stopped(run_dir, tmp_path, capsys):
    prompts, out, again = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "again.jsonl"))
    lines = [json.dumps({"prompt": text}) for text in ("abc", "", "abc abc", "no end " * 40, "a")]
    prompts.write_text("\n".join([*lines, "{broken"]))
    command = ["--run-dir", str(run_dir), "--max-new-tokens=9", "--num-samples=2", f"--prompts={prompts}"]
    assert generate.main([*command, f"--out={out}", "--rows=3"]) == 2
    said = capsys.readouterr().err
    assert f"{out}: 4 of 6 prompts" in said and f"{prompts}:6: '{{broken'" in said
    assert f"{prompts}:4: max_new_tokens=9" in said and "a shorter prompt" in said
    found = sorted(map(json.loads, out.read_text().splitlines()), key=lambda each: each["line"])
    assert [each["line"] for each in found] == [1, 2, 3, 5] and len(found[0]["samples"]) == 2
    # The same texts, whatever stands beside them and wherever a run begins.
    again.write_bytes(out.read_bytes()[: -len(out.read_bytes().splitlines()[-1]) // 2])
    assert generate.main([*command, f"--out={again}", "--rows=2"]) == 2
    assert sorted(map(json.loads, again.read_text().splitlines()), key=lambda each: each["line"]) == found


def test_a_conversation_is_read_once(run_dir, monkeypatch, capsys):
    made, of, lines = [], generate.engine_of, ["abc", "def", "no end " * 40]
    monkeypatch.setattr(generate, "engine_of", lambda *given: made.append(of(*given)) or made[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    sampling = ["--temperature=0", "--max-new-tokens=5"]
    assert generate.main(["--run-dir", str(run_dir), "--chat", *sampling]) == 0
    said = capsys.readouterr()
    assert "the conversation is over the model's context of 64; begin a new one." in said.err
    tokenizer = vishwamai_eqx.load(run_dir).tokenizer
    # The last token of an answer too, and each line's own.
    assert made[0].read == 1 + sum(len(tokenizer.encode_ids(line + "\n")) for line in lines[:2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompts=x.jsonl"], "prompts=x.jsonl needs --out; give both, or none."),
        (["--logprobs"], "logprobs=True is for JSON; give --json too."),
        (["--prompts=none.jsonl", "--out=x.jsonl"], "prompts=none.jsonl cannot be read (No such file or directory)"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, sentence, capsys):
    assert generate.main(arguments) == 2
    assert sentence in capsys.readouterr().err
