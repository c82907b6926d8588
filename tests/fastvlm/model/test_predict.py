import json

import numpy as np
import pytest

from fastvlm.__main__ import build_parser
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from fastvlm.model import predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, question in enumerate(scenes.questions(3, seed=11)):
        paths.append(str(folder / f"{index}.png"))
        question.image.save(paths[-1])
    return paths


def ask(capsys, *flags):
    code = run(build_parser, ["predict", "--model-path", str(scenes.CHECKPOINT), "--max-new-tokens", "40", *flags])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_one_picture_streams_its_answer_and_says_what_ran(capsys, pictures):
    code, out, err = ask(capsys, "--image-file", pictures[0], "--prompt", "Describe the picture.")
    assert code == 0 and out.startswith("A ") and out.rstrip().endswith(".")
    assert "PyTorch" in err and "cpu" in err and "float32" in err


def test_a_left_padded_batch_answers_as_single_runs_do(capsys, pictures):
    prompts = ["Describe the picture.", "How many shapes are there?", "What is at the top left?"]
    code, out, _ = ask(capsys, "--image-file", *pictures, "--prompt", *prompts, "--json")
    batch = json.loads(out.splitlines()[-1])["answers"]
    assert code == 0 and len(batch) == 9
    for row in batch:
        _, single, _ = ask(capsys, "--image-file", *row["images"], "--prompt", row["prompt"], "--json")
        assert json.loads(single.splitlines()[-1])["answers"][0]["answer"] == row["answer"]


def test_padding_on_the_right_would_be_noticed(demo_model):
    """Negative control: the same rows padded on the right, and the padding attended to, do not give those answers."""
    asked = list(scenes.questions(10, seed=11))
    embeds = [demo_model.embed(q.question, q.image) for q in asked]
    singles = [demo_model.generate(q.question, q.image, max_new_tokens=40) for q in asked]
    length = max(one.shape[1] for one in embeds)
    padded = [np.pad(one, ((0, 0), (0, length - one.shape[1]), (0, 0))) for one in embeds]
    answers = ["".join(demo_model.decode(demo_model.language.stream(one, 40))) for one in padded]
    assert answers != singles


def test_several_pictures_in_one_prompt_warn(capsys, pictures):
    code, out, err = ask(
        capsys, "--image-file", *pictures[:2], "--prompt", "<image>\n<image>\nDescribe the picture.", "--json"
    )
    rows = json.loads(out.splitlines()[-1])["answers"]
    assert code == 0 and len(rows) == 1 and rows[0]["images"] == pictures[:2]
    assert "warning: FastVLM was trained with one picture" in err


def test_no_picture_beams_and_sampling_run(capsys, pictures):
    assert ask(capsys, "--prompt", "Describe the picture.")[0] == 0
    assert ask(capsys, "--image-file", pictures[0], "--num_beams", "2")[0] == 0
    assert ask(capsys, "--image-file", pictures[0], "--temperature", "0.7", "--top_p", "0.9")[0] == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--image-file", "/nowhere.png"],
        ["--prompt", "<image> what?"],
        ["--num_beams", "0"],
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "1", "--top_p", "0"],
        ["--dtype", "int3"],
        ["--device", "tpu"],
        ["--conv-mode", "vicuna"],
    ],
)
def test_unusable_input_is_one_line_and_exit_2(capsys, flags):
    try:
        code, _, err = ask(capsys, *flags)
    except SystemExit as stop:  # argparse refuses by itself
        code, err = stop.code, capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err


def test_a_device_that_is_not_here_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="not on this machine"):
        predict.choose_device("cuda")


def test_pictures_times_prompts():
    assert [job.pictures for job in predict.plan(2, ["a", "<image>b"])] == [(0,), (1,), (0,), (1,)]
    assert predict.plan(2, ["<image><image>"]) == [predict.Job((0, 1), "<image><image>")]
    assert predict.plan(0, ["a"]) == [predict.Job((), "a")]
    with pytest.raises(UserError):
        predict.plan(3, ["<image><image>"])
