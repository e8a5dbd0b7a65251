"""Pictures sorted into folders: classes, scores, and WikiArt's styles."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.scorer_data.readers.base import BadValue
from library.scorer_data.readers.wikiart import year_of
from tests.helpers.rated_files import add_pictures, counts, read, write


def test_a_folder_is_a_class(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["n01440764/n01440764_10026.JPEG", "n01443537/x/ü 2.png", "n01443537/1.png", "loose.png", ".hidden/1.png"])
    write(tmp_path / "n01443537" / "notes.txt", "")
    write(tmp_path / "n01443537" / ".DS_Store", "")
    images, skipped = read(tmp_path, target="label")
    assert [(image.name, image.label, image.split) for image in images] == [
        ("n01440764/n01440764_10026.JPEG", "n01440764", None),
        ("n01443537/1.png", "n01443537", None),
        ("n01443537/x/ü 2.png", "n01443537", None),
    ]
    assert images[0].where == images[0].picture.key == f"{tmp_path}/n01440764/n01440764_10026.JPEG"
    assert counts(skipped) == {"picture is in no folder": 1, "file is no picture": 1}


def test_train_and_val_are_splits_and_not_classes(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["train/cat/1.png", "train/dog/1.png", "test/cat/2.png"])
    assert [(image.label, image.split) for image in read(tmp_path, target="label")[0]] == [("cat", "test"), ("cat", None), ("dog", None)]
    add_pictures(tmp_path, ["validation/dog/3.png", "validation/4.png", "other/dog/5.png"])
    images, skipped = read(tmp_path, target="label")
    assert {(image.name, image.split) for image in images} == {
        ("train/cat/1.png", "train"),
        ("train/dog/1.png", "train"),
        ("test/cat/2.png", "test"),
        ("validation/dog/3.png", "val"),
    }
    assert counts(skipped) == {"picture is in no folder": 1, "folder is no split": 1}


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["test/1.png", "real/1.png"])
    assert [image.label for image in read(tmp_path, target="label")[0]] == ["real", "test"]


def test_a_folder_is_a_score(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["01/a.png", "10/a.png", "-2.5/a.png", "10/b.png"])
    images, skipped = read(tmp_path)
    assert {(image.name, image.score) for image in images} == {("01/a.png", 1), ("10/a.png", 10), ("10/b.png", 10), ("-2.5/a.png", -2.5)}
    add_pictures(tmp_path, ["unsure/a.png", "unsure/b.png"])
    images, skipped = read(tmp_path, "score_folders", score_range=[0, 10])
    assert len(images) == 3
    assert counts(skipped) == {"score is outside score_range": 1, "the folder's name is not a finite number": 2}


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        read(tmp_path / "none", "folders", target="label")
    with pytest.raises(UserError, match="has no folders in it"):
        read(tmp_path, "folders", target="label")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="reader 'folders' gives label, but score is to be learned"):
        read(tmp_path, "folders")


# -- WikiArt -------------------------------------------------------------------------------------------------------------

PAINTINGS = [
    "Impressionism/edgar-degas_dancers-on-set-1880.jpg",
    "Impressionism/claude-monet_water-lilies-6.jpg",
    "Post_Impressionism/joaquãn-sorolla_my-family-1901.jpg",
]


@pytest.mark.parametrize(
    ("name", "year"),
    [
        ("Impressionism/edgar-degas_dancers-on-set-1880.jpg", 1880),
        ("Abstract_Expressionism/aaron-siskind_chicago-6-1961.jpg", 1961),
        ("Impressionism/edgar-degas_before-the-ballet-detail-1892-1.jpg", 1892),
        ("Impressionism/paul-gauguin_port-de-grenelle-1875(1).jpg", 1875),
        ("Pop_Art/someone_untitled-1960-61.jpg", 1960),
        ("Cubism/someone_winter-1917-1918.jpg", 1918),
    ],
)
def test_years_are_in_the_names_of_files(name: str, year: int) -> None:
    assert year_of(name) == year


@pytest.mark.parametrize("name", ["a_water-lilies-6.jpg", "a_beach-scene.jpg", "a_number-9999.jpg", "1880/a_x.jpg", "a_pod-19045.jpg"])
def test_names_without_a_year(name: str) -> None:
    with pytest.raises(BadValue, match="does not end in a year"):
        year_of(name)


def test_styles_artists_and_years_of_the_folders(tmp_path: Path) -> None:
    add_pictures(tmp_path, PAINTINGS)
    images, _ = read(tmp_path, target="label")
    assert [image.label for image in images] == ["Impressionism", "Impressionism", "Post_Impressionism"]
    assert [image.label for image in read(tmp_path, target="label", label="artist")[0]] == [
        "claude-monet",
        "edgar-degas",
        "joaquãn-sorolla",
    ]
    images, skipped = read(tmp_path, score_column="year")
    assert [image.score for image in images] == [1880, 1901] and counts(skipped) == {"name has no year": 1}
    with pytest.raises(UserError, match="label is genre"):
        read(tmp_path, target="label", label="genre")
    with pytest.raises(UserError, match="of WikiArt it can be year"):
        read(tmp_path, score_column="price")


def test_the_lists_of_artgan(tmp_path: Path) -> None:
    add_pictures(tmp_path / "wikiart", PAINTINGS)
    write(tmp_path / "style_class.txt", "12 Impressionism\n20 Post_Impressionism\n")
    train = write(tmp_path / "style_train.csv", f"{PAINTINGS[0]},12\n{PAINTINGS[2]},20\nnothing\n")
    write(tmp_path / "style_val.csv", f"{PAINTINGS[1]},12\nImpressionism/gone.jpg,12\n")
    images, skipped = read(tmp_path, target="label", image_dir=tmp_path / "wikiart")
    assert [(image.label, image.split) for image in images] == [
        ("Impressionism", "train"),
        ("Post_Impressionism", "train"),
        ("Impressionism", "val"),
    ]
    assert counts(skipped) == {"row cannot be read": 1, "picture is missing": 1}
    images, _ = read(train, target="label", image_dir=tmp_path / "wikiart")
    assert [(image.label, image.split) for image in images] == [("Impressionism", None), ("Post_Impressionism", None)]
    write(tmp_path / "genre_class.txt", "4 landscape\n")
    write(tmp_path / "genre_train.csv", f"{PAINTINGS[1]},4\n")
    assert [image.label for image in read(tmp_path, target="label", label="genre", image_dir=tmp_path / "wikiart")[0]] == ["landscape"]


def test_the_table_of_all_paintings(tmp_path: Path) -> None:
    add_pictures(tmp_path, PAINTINGS[:2])
    header = "filename,artist,genre,description,phash,width,height,genre_count,subset\n"
    rows = [
        f"{PAINTINGS[0]},edgar degas,['Impressionism'],dancers-on-set-1880,beb1,1,1,1,train\n",
        f"{PAINTINGS[1]},claude monet,['Impressionism'],x,b,1,1,1,test\n",
    ]
    path = write(tmp_path / "classes.csv", header + "".join(rows))
    images, _ = read(path, target="label", label="artist")
    assert [(image.label, image.split) for image in images] == [("edgar degas", "train"), ("claude monet", "test")]
    assert read(path)[0][0].score == 1880
