"""Files of prompts: what is broken is named, what is done is kept, whatever ends a run."""

import json
import resource

import pytest

from vishwamai_eqx import prompt_file
from vishwamai_eqx.prompt_file import Out, Prompt

PROMPTS = [Prompt(1, "a"), Prompt(2, "b"), Prompt(4, "ü")]


def test_each_broken_line_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'{"prompt": "a"}\r\n{"prompt": ""}\n\n{"prompt": "\xc3\xbc"}\n{"prompt": \n{"text": "c"}\n["prompt"]\n'
        b'{"prompt": "\xff"}\n{"prompt": "\\ud800"}\n7\n{"prompt": 7}'
    )
    prompts, broken = prompt_file.read(path)
    assert prompts == [Prompt(1, "a"), Prompt(2, ""), Prompt(4, "ü")]
    assert [sentence.partition(": ")[0] for sentence in broken] == [f"{path}:{n}" for n in range(5, 12)]
    with pytest.raises(ValueError, match="cannot be read"):
        prompt_file.read(tmp_path)


def test_a_run_goes_on_after_half_a_line(tmp_path):
    path = tmp_path / "out.jsonl"
    with Out(path, PROMPTS) as out:
        out.add(PROMPTS[2], [{"text": "x"}])
        out.add(PROMPTS[0], [{"text": "y"}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with Out(path, PROMPTS) as out:
        assert list(prompt_file.left(PROMPTS, out)) == PROMPTS[:2]
        out.add(PROMPTS[0], [{"text": "y"}])
    assert path.read_bytes() == whole
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [4, 1]


@pytest.mark.parametrize("content", ['{"line": 1, "prompt": "b", "samples": []}\n', "notes\nmore\n", "7\n", "notes"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="give another file"):
        Out(path, PROMPTS)
    assert path.read_text() == content
    with pytest.raises(ValueError, match="cannot be written"):
        Out(tmp_path, PROMPTS)


def test_on_a_full_disk_the_line_is_taken_back(tmp_path):
    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Out(path, PROMPTS) as out:
        out.add(PROMPTS[0], [{"text": "x"}])
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(OSError):
                out.add(PROMPTS[1], [{"text": "y"}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and out.done == {1}
        out.add(PROMPTS[1], [{"text": "y"}])
    assert len(path.read_text().splitlines()) == 2
