"""The data agrees with stock torchvision and torch: split, order, normalisation, augmentation, shares."""

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from lenet_pl import FashionMNISTDataModule
from lenet_pl.blocks import Block
from lenet_pl.errors import UsageError
from lenet_pl.loader import EvalLoader, shift

TRAIN, TEST = 330, 53


def stock(train):
    """The data set as a tutorial reads it, with a PIL image and a transform for each sample."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.2860], [0.3530])])
    data = datasets.FashionMNIST("data", train=train, transform=transform)
    return next(iter(DataLoader(data, batch_size=len(data))))


def gather(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def data(workdir):
    module = FashionMNISTDataModule(batch_size=8, val_size=60)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    return module


def test_test_images_are_those_of_stock_torchvision_bit_by_bit(data):
    images, labels = gather(data.test_dataloader())
    expected_images, expected_labels = stock(train=False)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


def test_an_epoch_holds_every_training_image_once_in_a_new_order(data):
    expected_images, expected_labels = stock(train=True)
    loader, epochs = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(gather(loader))
    validation = gather(data.val_dataloader())
    for images, labels in epochs:
        everything = torch.cat([images, validation[0]]), torch.cat([labels, validation[1]])
        for got, expected in zip(everything, (expected_images, expected_labels), strict=True):
            flat, wanted = (t.reshape(len(t), -1).sum(1).sort().values for t in (got, expected))
            torch.testing.assert_close(flat, wanted)
        # each image is one of stock torchvision's, with its label
        match = (images.flatten(1)[:, None] == expected_images.flatten(1)[None]).all(-1)
        assert (match.sum(1) == 1).all()
        assert torch.equal(labels, expected_labels[match.int().argmax(1)])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_the_last_smaller_batch_is_used(data):
    loader = data.train_dataloader()
    assert [len(labels) for _, labels in loader] == [8] * 33 + [6]
    assert loader.steps == 34


def test_blocks_hold_the_same_mini_batches(data):
    single = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.steps_per_block = 7
    loader.set_epoch(0)
    blocks = list(loader)
    assert all(isinstance(block, Block) for block in blocks)
    assert [len(b) for b in blocks] == [7, 7, 7, 7, 6]
    assert len(loader) == 5
    for (x, y), (other_x, other_y) in zip(single, [m for block in blocks for m in block], strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_the_split_is_disjoint_and_belongs_to_its_own_seed(workdir):
    splits = {}
    for key, arguments in {
        "a": {"batch_size": 8},
        "b": {"batch_size": 32},
        "c": {"split_seed": 1},
    }.items():
        torch.manual_seed(len(splits))  # the training seed is another matter
        module = FashionMNISTDataModule(val_size=60, **arguments)
        module.setup("fit")
        splits[key] = module
    assert torch.equal(splits["a"].val_set[0], splits["b"].val_set[0])
    assert not torch.equal(splits["a"].val_set[0], splits["c"].val_set[0])
    train, val = splits["a"].train_set[0].flatten(1), splits["a"].val_set[0].flatten(1)
    assert len(train) == TRAIN - 60
    assert len(val) == 60
    assert not (train[:, None] == val[None]).all(-1).any()


def test_no_validation_trains_on_everything(workdir):
    module = FashionMNISTDataModule(val_size=0)
    module.setup("fit")
    assert len(module.train_set[1]) == TRAIN
    assert list(module.val_dataloader()) == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_epoch(data, world):
    """The mini-batches of all ranks together are those of one process with the whole batch."""
    data.batch_size, data.flip, data.shift = 6, True, 2
    whole = list(data.train_dataloader())
    data.batch_size = 6 // world
    parts = []
    for rank in range(world):
        loader = data.train_dataloader()
        loader.rank, loader.world = rank, world
        parts.append(list(loader))
    assert {len(p) for p in parts} == {45}  # every rank takes as many steps
    for step, (images, labels) in enumerate(whole):
        shares = [p[step] for p in parts]
        interleaved = torch.stack([s[1] for s in shares], 1).flatten()
        assert torch.equal(interleaved, labels)
        assert torch.equal(torch.stack([s[0] for s in shares], 1).flatten(0, 1), images)


@pytest.mark.parametrize("world", [2, 3])
def test_every_test_image_is_counted_once_over_all_processes(data, world):
    seen = []
    for rank in range(world):
        loader = EvalLoader(*data.test_set, data.mean, data.std, rank, world)
        seen.append(gather(loader)[0])
        assert len(seen[-1]) == len(range(rank, TEST, world))
    seen = torch.cat(seen).flatten(1)
    expected = stock(train=False)[0].flatten(1)
    assert len(seen) == TEST
    assert ((seen[:, None] == expected[None]).all(-1).sum(0) == 1).all()


def test_shift_is_torchvisions_affine_per_image():
    images = torch.randint(1, 256, (20, 1, 28, 28), dtype=torch.uint8)
    offsets = torch.randint(-3, 4, (20, 2))
    for image, (down, right), moved in zip(images, offsets.tolist(), shift(images, offsets, 3), strict=True):
        expected = v2.functional.affine(image, angle=0.0, translate=[right, down], scale=1.0, shear=[0.0, 0.0])
        assert torch.equal(moved, expected)


def test_augmentation_is_per_image_and_only_in_training(data):
    plain = gather(data.train_dataloader())[0]
    data.flip = True
    mirrored = gather(data.train_dataloader())[0]
    flipped = (mirrored == plain.flip(-1)).flatten(1).all(1)
    kept = (mirrored == plain).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 0.35 < flipped.float().mean() < 0.65
    assert torch.equal(gather(data.test_dataloader())[0], stock(train=False)[0])


def test_a_stale_processed_folder_is_never_read(tiny, tmp_path, monkeypatch):
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST/raw").symlink_to(tiny[0] / "FashionMNIST/raw")
    processed = tmp_path / "FashionMNIST/processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)), processed / name)
    module = FashionMNISTDataModule(data_dir=str(tmp_path), val_size=60)
    module.setup("fit")
    assert len(module.train_set[1]) == TRAIN - 60


def test_fitting_does_not_read_the_test_images(data, monkeypatch):
    module = FashionMNISTDataModule(val_size=60)
    read = []
    monkeypatch.setattr(
        module, "_read", lambda train: read.append(train) or (torch.zeros(70, 1, 28, 28), torch.zeros(70))
    )
    module.setup("fit")
    module.setup("validate")
    assert read == [True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"val_size": 60_000},
        {"val_size": -1},
        {"steps_per_execution": 0},
        {"shift": 28},
        {"std": 0.0},
    ],
)
def test_refuses_by_name_and_value(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UsageError, match=f"data.{name}={value}: expected"):
        FashionMNISTDataModule(**arguments)


@pytest.mark.data
def test_real_data_is_stock_torchvision():
    module = FashionMNISTDataModule()
    module.prepare_data()
    module.setup("test")
    images, labels = gather(module.test_dataloader())
    expected_images, expected_labels = stock(train=False)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)
