"""A message names what to give as Python has it, and on the command line as its options are called."""

import pytest

import lte
from lte.argument_error import Argument, ArgumentError
from lte.cli.main import main

FILE = Argument("calibration_data", "FILE")
CONSENT = Argument("trust_remote_code", "True")


@pytest.mark.parametrize(
    ("argument", "parameter", "option"),
    [
        (FILE, "calibration_data=FILE", "--calibration-text FILE"),
        (CONSENT, "trust_remote_code=True", "--trust-remote-code"),
        (Argument("class_names"), "class_names", "--class-names"),
    ],
)
def test_an_argument_in_both_forms(argument, parameter, option):
    error = ArgumentError("{braces} are text: give ", argument, " now")
    assert str(error) == f"{{braces}} are text: give {parameter} now"
    assert error.as_options({"calibration_data": "calibration_text"}) == f"{{braces}} are text: give {option} now"


def test_the_same_mistake_from_python_and_from_the_command(tmp_path, capsys):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "made", "auto_map": {"AutoConfig": "code.Made"}}')
    text.write_text("some text")
    with pytest.raises(ValueError, match=r"give trust_remote_code=True$"):
        lte.train(str(model), lte.LTEConfig(target_sparsity=0.5), str(text), str(tmp_path / "out"), use_cpu=True)
    given = ["--text", str(text), "--target-sparsity", "0.5", "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["train", "--model", str(model), *given]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("give --trust-remote-code")
