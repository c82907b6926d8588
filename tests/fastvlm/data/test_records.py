"""Training data in the formats that people have: what is read alike, and every fault of a file at once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvlm.common.errors import UserError
from fastvlm.data.records import QUESTION, Record, Turn, as_llava, check, read_records

QUESTIONS = ("<image>\nWhat is it?", "Sure?")
ANSWERS = ("A ring.", "Yes.")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b c.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    return tmp_path


def llava(questions=QUESTIONS, answers=ANSWERS, **more):
    turns = [
        {"from": speaker, "value": text}
        for pair in zip(questions, answers)
        for speaker, text in zip(("human", "gpt"), pair)
    ]
    return {"image": "a.png", "conversations": turns} | more


def messages(questions=QUESTIONS, answers=ANSWERS, **more):
    turns = [
        {"role": role, "content": text}
        for pair in zip(questions, answers)
        for role, text in zip(("user", "assistant"), pair)
    ]
    return {"messages": turns} | more


def read(folder, *rows, name="train.jsonl", **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = "\n".join(lines) if name.endswith(("l", "csv")) else f"[{','.join(lines)}]"
    (folder / name).write_text(text, "utf-8")
    return read_records(folder / name, **options)


def faults(folder, *rows, **options):
    with pytest.raises(UserError) as error:
        read(folder, *rows, **options)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder / options.get('name', 'train.jsonl')}: ")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_one_conversation_in_many_formats(folder, name):
    text = {"type": "text", "text": "What is it?"}
    parts = (
        [{"type": "image"}, text],
        [text, {"type": "image"}],  # pictures come first, as in the chat template
        [{"type": "text", "text": "What "}, {"type": "image"}, {"type": "text", "text": "is it?"}],
    )
    inline = (
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": f"file://{folder}/a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": f"{folder}/a.png", "detail": "low"}},
    )
    rows = [
        llava(),
        llava(image=["a.png"]),
        llava(image=None, images=["a.png"]),
        llava(image=str(folder / "a.png")),
        llava(("What is it?", "Sure?")),  # no place named
        llava(("What is it?<image>", "Sure?")),
        messages(images=["a.png"]),
        messages(images=[{"path": "a.png", "bytes": None}], id=7),
        messages(("What is it?", "Sure?"), image="a.png"),
        *(messages((content, "Sure?"), images=["a.png"]) for content in parts),
        *(messages(([picture, text], [{"type": "text", "text": "Sure?"}])) for picture in inline),
    ]
    found = read(folder, *rows, name=name)
    turns = [("user", QUESTIONS[0]), ("assistant", ANSWERS[0]), ("user", QUESTIONS[1]), ("assistant", ANSWERS[1])]
    for number, record in enumerate(found, 1):
        expected_name = "7" if number == 8 else f"{'record' if name == 'train.json' else 'line'} {number}"
        assert record == Record(expected_name, (folder / "a.png",), tuple(Turn(*turn) for turn in turns)), number
    assert len(found) == len(rows) and read(folder, *map(as_llava, found)) == found


def test_captions(folder):
    (folder / "elsewhere").mkdir()
    tables = {
        "a.csv": 'file_name,text\na.png,A caption.\nsub/b c.jpg,"Two\nlines, ""quoted""."\n',
        "metadata.csv": "\ufeffcaption,image,n\r\nA caption.,a.png,1\r\n\r\n"
        '"Two\nlines, ""quoted"".",sub/b c.jpg,2\r\n',
        "metadata.jsonl": json.dumps({"file": "a.png", "caption": "A caption."})
        + "\n"
        + json.dumps({"image": "sub/b c.jpg", "text": 'Two\nlines, "quoted".'}),
    }
    for name, text in tables.items():
        path = folder / "elsewhere" / name
        path.write_bytes(text.encode())
        found = read_records(path, folder)
        assert [record.images for record in found] == [(folder / "a.png",), (folder / "sub/b c.jpg",)], name
        assert [record.turns[1].text for record in found] == ["A caption.", 'Two\nlines, "quoted".']
        assert {record.turns[0] for record in found} == {Turn("user", f"<image>\n{QUESTION}")}
    asked = read(folder, "image,question,answer", "a.png,What?,This.", name="vqa.csv")
    assert [turn.text for turn in asked[0].turns] == ["<image>\nWhat?", "This."]


def test_places_of_several_pictures_and_a_system_turn(folder):
    two = ["a.png", "sub/b c.jpg"]
    kept, front, text = read(
        folder,
        llava((" Is <image> like <image>? ", "Sure?"), image=two),
        llava((" Are they alike? ", "Sure?"), images=two, image=None),
        {"messages": [{"role": "system", "content": "Be brief."}, *messages(("Hi. ",), ("Yes.",))["messages"]]},
    )
    assert kept.turns[0].text == " Is <image> like <image>? " and kept.images[1].name == "b c.jpg"
    assert front.turns[0].text == "<image>\n<image>\n Are they alike? "
    assert read(folder, *map(as_llava, (kept, front, text))) == [kept, front, text]
    assert text.images == () and text.turns[:2] == (Turn("system", "Be brief."), Turn("user", "Hi. "))


def test_every_fault_of_a_file_at_once(folder):
    turns = llava()["conversations"]
    rows = {
        "{": "no JSON",
        '{"a": 1, "a": 2}': "twice",
        "3": "got a number, expected an object",
        "{}": "picture: expected one of image, file_name",
    }
    message = faults(folder, llava(), *rows, messages(images=["a.png"]))
    for number, expected in enumerate(rows.values(), 2):
        assert f"line {number}: " in message and expected in message.split(f"line {number}: ")[1].split("; ")[0]
    assert "line 1:" not in message and "line 6:" not in message
    rows = {
        "both conversations and messages": llava() | messages(),
        "both image and images": llava(images=["a.png"]),
        "pictures in the contents, too": messages(([{"type": "image", "image": "a.png"}], "?"), images=["a.png"]),
        "conversations 2: got gpt, expected human": {"conversations": [{"from": "system", "value": "x"}, *turns[1:]]},
        'messages 1: unknown role "tool"': {"messages": [{"role": "tool", "content": "x"}]},
        "messages 2: weight: not supported": {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]
        },
        "tools: not supported": messages(("x",), tools=["search"]),
        "system: not supported; make it the first turn": messages(("x",), system="Be brief."),
        "videos: only pictures": messages(("x",), videos=["a.mp4"]),
        '"https://x.org/a.png": a URL': llava(image="https://x.org/a.png"),
    }
    message = faults(folder, *rows.values())
    for number, expected in enumerate(rows, 1):
        assert expected in message.split(f"line {number}: ")[1].split(f"line {number + 1}: ")[0]
    assert faults(folder, *rows.values(), *["?"] * 5).endswith("; and 5 more")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../a.png", "leaves the folder of pictures by .."),
        ("sub/../../a.png", "leaves the folder of pictures by .."),
        ("data:image/png;base64,AAAA", "a URL, expected a file"),
        ("x" * 5000, "no such file"),
        ("a\0.png", "no such file"),
        ("sub", "no such file"),
        ("", "got no text, expected a file's name"),
        (3, "got a number, expected a file's name"),
        ({"bytes": "AAAA", "path": "a.png"}, "got an object, expected a file's name"),
    ],
)
def test_pictures_that_are_no_files_in_the_folder(folder, name, expected):
    (folder / "sub" / "train.jsonl").write_text(json.dumps(llava(image=name)))
    with pytest.raises(UserError) as error:
        read_records(folder / "sub" / "train.jsonl", folder)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image;caption\na.png;x", "line 2: picture: expected one of"),
        ("image,caption\na.png,x,y\na.png\na.png,z", "line 2: 3 columns, expected 2, as line 1 has; line 3: 1 columns"),
        ('image,caption\na.png,"x\ny"\na.png,"z', "line 4: no CSV"),
        ('image,caption\na.png,"x\ny"\na.png,', "line 4: caption: expected one of"),
        ("image,image\na.png,x", "line 1: a column's name twice"),
        ("image,caption,video\na.png,x,b.mp4", "line 2: video: only pictures"),
        (
            "image,caption,text\na.png,x,y",
            "line 2: caption: expected one of caption, text, answer, got caption and text",
        ),
        ("image,caption\n", "no records"),
        ("", "no records"),
        ("version https://git-lfs.github.com/spec/v1\noid x", "git-lfs-pointer"),
    ],
)
def test_faults_of_tables(folder, text, expected):
    assert expected in faults(folder, *text.split("\n"), name="t.csv")


def test_check_names_every_picture_that_does_not_open_once(folder):
    found = read(folder, llava(), llava(), llava(image="sub/b c.jpg"))
    check(found)
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        check(found)
    assert str(error.value).count("a.png") == 1 and "b c.jpg" not in str(error.value)


KEYS = (
    "from",
    "value",
    "role",
    "content",
    "type",
    "image",
    "images",
    "image_url",
    "url",
    "path",
    "text",
    "weight",
    "id",
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.sampled_from(["", "a.png", "user", "human", "gpt", "<image>", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["conversations", "messages", "image", "images", "caption", "id"]), VALUES, st.booleans())
def test_whatever_is_in_a_record_it_is_read_or_refused(tmp_path_factory, key, value, questions):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "any.json"
    for record in ({key: value}, llava() | {key: value}, messages() | {key: value}):
        path.write_text(json.dumps([record]))
        try:
            read_records(path, folder, questions)
        except UserError as error:
            assert str(error).startswith(f"{path}: record 1: ")
