"""What a model writes, shown to a person."""

from vishwamai_eqx.evaluation import printable


def test_no_sample_steers_the_terminal():
    written = "def f():\n\treturn '\x1b[2J\x9b31m\r\x00\x7f'  # naïve 漢字 👩‍👩‍👧"
    assert printable(written) == "def f():\n\treturn '\\x1b[2J\\x9b31m\\r\\x00\\x7f'  # naïve 漢字 👩‍👩‍👧"
