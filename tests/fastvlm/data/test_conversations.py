"""Questions from folders, LLaVA-format files and the demo set; every fault of a file at once."""

import json

import pytest
from PIL import Image

from fastvlm.common.errors import UserError
from fastvlm.data import conversations, records, scenes
from fastvlm.data.prompt import SYSTEM


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / name)
    return tmp_path


def record(question="<image>\nWhat is it?", answer="A picture.", **other):
    turns = [{"from": "human", "value": question}]
    if answer is not None:
        turns.append({"from": "gpt", "value": answer})
    return {"id": "one", "image": "b.png", "conversations": turns} | other


def write(folder, records, name="questions.jsonl"):
    path = folder / name
    if name.endswith("l"):
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in records), "utf-8")
    else:
        path.write_text(json.dumps(records), "utf-8")
    return path


def test_a_folder_asks_one_question_about_each_picture_by_name(folder):
    samples = conversations.load(folder)
    assert [(sample.name, sample.question, sample.answer) for sample in samples] == [
        ("a.jpg", conversations.QUESTION, None),
        ("b.png", conversations.QUESTION, None),
    ]
    assert samples[1].image().getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl"])
def test_llava_records(folder, name):
    more = [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Still."}]
    many = record()
    many["conversations"] += more
    text = record("What is 1 + 1?\u2028Say it.", None)
    del text["image"], text["id"]
    first, second = conversations.load(write(folder, [many, text], name))
    assert (first.name, first.question, first.answer) == ("one", "What is it?", "A picture.")
    assert first.image().size == (20, 10)
    assert second.image is None and second.answer is None and second.question == "What is 1 + 1?\u2028Say it."
    assert second.name in ("line 2", "record 2")


def test_pictures_in_another_folder(folder, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("elsewhere"), [record()])
    with pytest.raises(UserError, match="no such file"):
        conversations.load(path)
    assert conversations.load(path, folder)[0].image().size == (20, 10)


def test_all_faults_of_a_file_at_once(folder):
    lines = [
        record(),
        "{",
        record(image="gone.png", question="<image>"),
        record(image=["a.jpg", "b.png"]),
        record(conversations=[]),
        record(conversations=[{"from": "gpt", "value": "Hello."}]),
        record(image=None),
        "[1]",
        "",
    ]
    with pytest.raises(UserError) as caught:
        conversations.load(write(folder, lines))
    message = str(caught.value)
    assert "\n" not in message and "line 1:" not in message and "line 9" not in message
    for expected in (
        "line 2: no JSON",
        "line 3: image: no such file: " + str(folder / "gone.png") + ", no question besides <image>",
        "line 4: 1 <image> in the texts for 2 picture(s): name each picture once, or none, 2 pictures, expected one",
        "line 5: conversations: expected a list",
        "line 6: conversations 1: got gpt, expected human",
        "line 7: 1 <image> in the texts for 0 picture(s)",
        "line 8: got a list",
    ):
        assert expected in message


def test_a_long_list_of_faults_is_cut(folder):
    with pytest.raises(UserError, match=r"line 10: .*; and 15 more$"):
        conversations.load(write(folder, ["?"] * 25))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", "got an object, expected a list"),
        ("a.json", b"[", "no JSON"),
        ("a.json", b"[]", "no records"),
        ("a.jsonl", b"\n\n", "no records"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"hello", "a file of another kind"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        conversations.load(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        conversations.load(tmp_path / "gone.json")
    with pytest.raises(UserError, match="no pictures"):
        conversations.load(tmp_path)


def test_check_names_every_picture_that_does_not_open(folder):
    conversations.check(conversations.load(folder))
    for name in ("c.png", "d.jpg"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        conversations.check(conversations.load(folder))
    assert "c.png" in str(caught.value) and "d.jpg" in str(caught.value) and "a.jpg" not in str(caught.value)


def test_demo_samples_are_the_demo_set():
    samples = conversations.demo_samples(5)
    assert [(sample.question, sample.answer) for sample in samples] == [
        (asked.question, asked.answer) for asked in scenes.questions(5)
    ]
    assert samples[4].image().tobytes() == [*scenes.questions(5)][4].image.tobytes()
    other = conversations.demo_samples(5, "train")
    assert [sample.image().tobytes() for sample in other] != [sample.image().tobytes() for sample in samples]


def test_drawn_samples():
    first, second = conversations.drawn_samples(2)
    assert first.image().tobytes() != second.image().tobytes() and first.answer is None


@pytest.mark.parametrize(
    "key",
    ["video", "Videos", "video_path", "audio_file", "sound", "speech", "point_cloud", "pointcloud", "depth",
     "image_path", "image_urls"],
)  # fmt: skip
def test_another_medium_is_a_fault_of_its_record(folder, key):
    with pytest.raises(UserError, match=rf"line 2: {key}: only pictures"):
        conversations.load(write(folder, [record(), record(**{key: ["a.bin"]})]))


@pytest.mark.parametrize(
    "mark", ["<video>", "<Audio>", "<video_1>", "<point_cloud>", "<|video_pad|>", "<|vision_start|>", "<image_2>"]
)
@pytest.mark.parametrize("turn", [0, 1])
def test_a_mark_of_another_medium_is_a_fault_of_its_record(folder, mark, turn):
    other = record()
    other["conversations"][turn]["value"] += f"\n{mark}"
    with pytest.raises(UserError) as error:
        conversations.load(write(folder, [record(), other]))
    assert f"line 2: {mark}: only <image> can stand in a text" in str(error.value)


def test_parts_of_other_formats_never_become_text(folder):
    """Contents with parts of other types are no text, and no LLaVA record has any."""
    parts = [{"type": kind, kind: "a.bin"} for kind in ("text", "video", "audio", "thermal")]
    several = record()
    several["conversations"][0]["value"] = parts
    with pytest.raises(UserError) as error:
        conversations.load(write(folder, [{"messages": [{"role": "user", "content": parts}]}, several]))
    for kind in ("video", "audio", "thermal"):
        assert f'messages 1: {{"type": "{kind}"' in str(error.value)
    assert 'line 2: conversations 1: expected {"from"' in str(error.value)


def test_what_only_looks_like_another_medium_is_read(folder):
    other = record(
        "<image>\nWhat does <div> or a < b mean in a video?", video=None, videos=[], video_id="v1", depth_cm=3
    )
    (sample,) = conversations.load(write(folder, [other]))
    assert sample.question == "What does <div> or a < b mean in a video?"


def test_a_record_that_can_be_learnt_from_but_not_asked_is_refused(folder):
    """The exported model takes one picture, in front of the question, and every question has the same system line."""
    turns = record()["conversations"]
    own = record(conversations=[{"from": "system", "value": "Be brief."}, *turns])
    usual = record(conversations=[{"from": "system", "value": SYSTEM}, *turns])
    later = record(
        "Hello.", conversations=[{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes?"}, *turns]
    )
    several = record("What are they?", image=["a.jpg", "b.png"])
    path = write(folder, [own, usual, later, several])
    with pytest.raises(UserError) as error:
        conversations.load(path)
    for place, message in ((1, "a system turn"), (3, "the picture stands in a later question"), (4, "2 pictures")):
        assert f"line {place}: {message}" in str(error.value)
    assert "line 2" not in str(error.value) and len(records.read_records(path)) == 4
    assert conversations.load(write(folder, [usual]))[0].question == "What is it?"


def test_messages_and_captions_are_questions_too(folder):
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": "a.jpg"}]
    rows = [{"messages": [{"role": "user", "content": parts}]}, {"file_name": "b.png", "text": " A picture. "}]
    asked, caption = conversations.load(write(folder, rows))
    assert (asked.question, asked.answer, asked.image().getpixel((0, 0))[2] > 200) == ("What is it?", None, True)
    assert (caption.question, caption.answer) == (conversations.QUESTION, "A picture.")
