import numpy as np
import pytest

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


@pytest.fixture
def ask(cli):
    return lambda *flags: cli("predict", "--model-path", scenes.CHECKPOINT, "--max-new-tokens", "40", *flags)


def test_one_picture_streams_its_answer_and_says_what_ran(ask, pictures):
    answer = ask("--image-file", pictures[0], "--prompt", "Describe the picture.")
    assert answer.code == 0 and answer.out.startswith("A ") and answer.out.rstrip().endswith(".")
    assert "PyTorch" in answer.err and "cpu" in answer.err and "float32" in answer.err


def test_a_left_padded_batch_answers_as_single_runs_do(ask, pictures):
    prompts = ["Describe the picture.", "How many shapes are there?", "What is at the top left?"]
    batch = ask("--image-file", *pictures, "--prompt", *prompts, "--json").document["answers"]
    assert len(batch) == 9
    for row in batch[::2]:
        single = ask("--image-file", *row["images"], "--prompt", row["prompt"], "--json").document
        assert single["answers"][0]["answer"] == row["answer"]


def test_padding_on_the_right_would_be_noticed(demo_model):
    """Negative control: the same rows padded on the right, and the padding attended to, do not give those answers."""
    asked = list(scenes.questions(10, seed=11))
    embeds = [demo_model.embed(q.question, q.image) for q in asked]
    singles = [demo_model.generate(q.question, q.image, max_new_tokens=40) for q in asked]
    length = max(one.shape[1] for one in embeds)
    padded = [np.pad(one, ((0, 0), (0, length - one.shape[1]), (0, 0))) for one in embeds]
    answers = ["".join(demo_model.decode(demo_model.language.stream(one, 40))) for one in padded]
    assert answers != singles


def test_several_pictures_in_one_prompt_warn(ask, pictures):
    prompt = "<image>\n<image>\nDescribe the picture."
    answer = ask("--image-file", *pictures[:2], "--prompt", prompt, "--json")
    (row,) = answer.document["answers"]
    assert row["images"] == pictures[:2] and "warning: FastVLM was trained with one picture" in answer.err


def test_no_picture_beams_and_sampling_run(ask, pictures):
    assert ask("--prompt", "Describe the picture.").code == 0
    assert ask("--image-file", pictures[0], "--num_beams", "2").code == 0
    assert ask("--image-file", pictures[0], "--temperature", "0.7", "--top_p", "0.9").code == 0


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
def test_unusable_input_is_one_line_and_exit_2(ask, flags):
    answer = ask(*flags)
    assert answer.code == 2 and len([line for line in answer.err.splitlines() if line.startswith("error:")]) == 1


def test_a_device_that_is_not_here_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="--device: got cuda, expected "):
        predict.choose_device("cuda")


def test_pictures_times_prompts():
    assert [job.pictures for job in predict.plan(2, ["a", "<image>b"])] == [(0,), (1,), (0,), (1,)]
    assert predict.plan(2, ["<image><image>"]) == [predict.Job((0, 1), "<image><image>")]
    assert predict.plan(0, ["a"]) == [predict.Job((), "a")]
    with pytest.raises(UserError):
        predict.plan(3, ["<image><image>"])
