"""A list of files is a data set: its lines, its labels, its splits; what is wrong with it is told with the line."""

import pytest
from test_data_sources import names, write

from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.keys import Data


def opened(path, name="folder"):
    return open_splits(Data(name=name, path=str(path)))


def test_labels_follow_the_extension_or_a_tab(tmp_path):
    files = ["a b.png", "x/1.JPEG", "x/2.png", "y/ü 3.png", "z.png"]
    write(tmp_path, *files)
    lines = ["a b.png golden retriever", "x/1.JPEG\tcat", "", "x/2.png   cat", "y/ü 3.png\tgolden retriever", f"{tmp_path}/z.png cat"]
    (tmp_path / "all.txt").write_text("\ufeff" + "\r\n".join(lines))
    splits = opened(tmp_path / "all.txt")
    assert splits.train.classes == ("cat", "golden retriever")
    told = {part.name_of(i): part.classes[part.labels[i]] for part in splits for i in range(len(part))}
    assert told == dict(zip([*files[:4], f"{tmp_path}/z.png"], ["golden retriever", "cat", "cat", "golden retriever", "cat"], strict=True))


def test_numbers_are_labels_in_their_order_and_paths_alone_have_none(tmp_path):
    files = [f"{i}.png" for i in range(12)]
    write(tmp_path, *files)
    (tmp_path / "numbers.txt").write_text("".join(f"{file} {9 + i % 3}\n" for i, file in enumerate(files)))
    train = opened(tmp_path / "numbers.txt").train
    assert train.classes == ("9", "10", "11")
    assert [train.labels[i] for i in range(len(train))] == [int(train.name_of(i).split(".")[0]) % 3 for i in range(len(train))]
    (tmp_path / "bare.txt").write_text("\n".join(files))
    bare = opened(tmp_path / "bare.txt")
    assert bare.train.labels is None
    assert set.union(*(names(part) for part in bare)) == set(files)
    assert names(bare.test) == names(opened(tmp_path).test)  # the fifth is that of the folder


def test_lists_beside_train_are_the_splits(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(20)))
    for name, numbers in (("train", range(10)), ("val", range(10, 13)), ("test", range(13, 20))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}.png {'ab'[i % 2]}\n" for i in numbers))
    splits = opened(tmp_path / "train.txt")
    assert [len(part) for part in splits] == [10, 3, 7]
    assert splits.test.labels.tolist() == [i % 2 for i in range(13, 20)]
    (tmp_path / "test.txt").write_text("13.png c\n")
    with pytest.raises(ConfigError, match=r"test\.txt has the label 'c', which .*train\.txt has not"):
        opened(tmp_path / "train.txt")
    (tmp_path / "test.txt").write_text("13.png\n")
    with pytest.raises(ConfigError, match=r"test\.txt has no labels"):
        opened(tmp_path / "train.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("0.png cat\n1.png\n2.png dog\n", r"1\.png has no label"),
        ("0.png\n1.png\nx.png\ny.png\n", r"not there, x\.png, y\.png: paths are relative"),
        ("0.png\nfilm.mp4 3\n", r"'film\.mp4 3' is neither PATH nor PATH LABEL"),
        ("0.png\n1.png\n", "at least 3"),
    ],
)
def test_a_wrong_list_is_answered_in_one_sentence(tmp_path, text, message):
    write(tmp_path, *(f"{i}.png" for i in range(3)))
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match="is a file"):
        opened(tmp_path / "list.txt", "shards")
