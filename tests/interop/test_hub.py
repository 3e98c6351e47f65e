"""Models down from and up to a hub that really speaks, and out of huggingface_hub's own cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, hf_hub_download

from tests.interop.hub_server import TOKEN, Client, Hub
from tests.models.shapes import tiny
from vitscale.errors import CheckpointError
from vitscale.files.sources import locate
from vitscale.interop.pretrained import processor_dict
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTModel

START = """
import torch
from vitscale import *
from vitscale.files.sources import locate
def total(model):
    return sum(p.double().abs().sum().item() for p in model.parameters())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's folder, in several files."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny(ViTForImageClassification)
    model.save_pretrained(folder, max_shard_size="8KB")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_dict(model.config, (0.5,), (0.5,))))
    (folder / "tf_model.h5").write_bytes(b"not to be fetched")
    return folder


@pytest.fixture(scope="module")
def hub(saved: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("someone/vit-tiny", saved)
        hub.add("someone/vit-gated", saved, gated=True)
        hub.add("someone/vit-private", saved, private=True)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    with Client(hub.url, home) as client:
        client(START)
        yield client


def total(model: ViTModel) -> float:
    return sum(parameter.double().abs().sum().item() for parameter in model.parameters())


def done(answer: dict[str, Any]) -> Any:
    assert answer["error"] is None, answer
    return answer["value"]


def refused(answer: dict[str, Any]) -> str:
    """The one line of a CheckpointError."""
    assert answer["error"] is not None
    name, text = answer["error"]
    assert name == "CheckpointError", answer
    assert "\n" not in text
    return text


def test_down_by_name(hub: Hub, client: Client) -> None:
    hub.requests.clear()
    found = done(client("value = total(AutoModelForImageClassification.from_pretrained('someone/vit-tiny'))"))
    assert found == total(tiny(ViTForImageClassification))
    asked = " ".join(hub.requests)
    assert "model-00001-of-" in asked
    assert "tf_model" not in asked
    assert " 404 " not in asked
    # Again: only whether the hub has a newer commit is asked, twice.
    hub.requests.clear()
    done(client("value = total(AutoModelForImageClassification.from_pretrained('someone/vit-tiny'))"))
    assert hub.requests == ["GET /api/models/someone/vit-tiny", "HEAD /someone/vit-tiny/resolve/main/config.json"]


def test_a_config_or_a_processor_takes_no_weights(hub: Hub, client: Client, home: Path) -> None:
    hub.requests.clear()
    code = "where = {'cache_dir': %r}; value = [AutoConfig.from_pretrained('someone/vit-tiny', **where).num_labels, "
    code += "AutoImageProcessor.from_pretrained('someone/vit-tiny', **where).size]"
    assert done(client(code % str(home / "other"))) == [5, {"height": 16, "width": 16}]
    assert not any("safetensors" in each for each in hub.requests)


def test_a_revision_and_a_subfolder(hub: Hub, client: Client, saved: Path, tmp_path: Path) -> None:
    tiny(ViTForImageClassification, num_labels=9).save_pretrained(tmp_path / "inner")
    repo = hub.add("someone/two", saved)
    repo.commit({path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}, "nine")
    code = "value = AutoModelForImageClassification.from_pretrained('someone/two', %s).config.num_labels"
    assert done(client(code % "revision='nine', subfolder='inner'")) == 9
    assert done(client(code % f"revision='{repo.branches['main']}'")) == 5
    said = refused(client(code % "revision='nein'"))
    assert said == "someone/two: has no revision 'nein'; did you mean nine?"
    assert "inner/config.json" not in refused(client(code % "revision='nine'"))


def test_without_the_hub(hub: Hub, client: Client, home: Path) -> None:
    """From the cache: asked for, by HF_HUB_OFFLINE, and where the hub is down; clear where it is not there."""
    load = "value = total(AutoModel.from_pretrained('someone/vit-tiny'%s))"
    expected = done(client(load % ""))
    hub.requests.clear()
    assert done(client(load % ", local_files_only=True")) == expected
    assert hub.requests == []
    missing = refused(client("AutoModel.from_pretrained('someone/other', local_files_only=True)"))
    assert "someone/other: no such folder" in missing
    assert "local_files_only=True" in missing
    nearest = refused(client("AutoModel.from_pretrained('someone/vit-tinny', local_files_only=True)"))
    assert nearest.endswith("did you mean someone/vit-tiny?")
    hub.broken = True
    try:
        assert done(client(load % "")) == expected
        assert "cannot be reached" in refused(client("AutoModel.from_pretrained('someone/vit-none')"))
    finally:
        hub.broken = False
    with Client(hub.url, home, HF_HUB_OFFLINE="1") as offline:
        offline(START)
        hub.requests.clear()
        assert done(offline(load % "")) == expected
        assert hub.requests == []
        assert "cannot be reached" in refused(offline("AutoModel.from_pretrained('someone/vit-none')"))


def test_a_mistyped_name_names_the_nearest(client: Client) -> None:
    said = refused(client("AutoModel.from_pretrained('someone/vit-tinny')"))
    assert "no such model on the hub" in said
    assert said.endswith("did you mean someone/vit-tiny?")
    assert refused(client("AutoModel.from_pretrained('sumone/vit-tiny')")).endswith("did you mean someone/vit-tiny?")
    assert "no name that a model on the hub can have" in refused(client("AutoModel.from_pretrained('so--me')"))


def test_who_may_see_it(client: Client) -> None:
    load = "value = total(AutoModel.from_pretrained('someone/vit-%s', token=%r))"
    assert "its owner wants to be asked" in refused(client(load % ("gated", False)))
    assert "pass token" in refused(client(load % ("private", False)))
    assert "refuses the token" in refused(client(load % ("private", "hf_wrong")))
    assert done(client(load % ("private", TOKEN))) == done(client(load % ("gated", TOKEN)))
    assert TOKEN not in refused(client(load % ("none", TOKEN)))


def test_repositories_that_hold_no_model(hub: Hub, client: Client, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    hub.add("someone/empty", tmp_path)
    said = refused(client("AutoModel.from_pretrained('someone/empty')"))
    assert said == "someone/empty: has neither model.safetensors nor pytorch_model.bin; it has config.json"
    hub.repos["someone/empty"].commit({"README.md": b""})
    assert "has no config.json; it has README.md" in refused(client("AutoModel.from_pretrained('someone/empty')"))
    index = {"weight_map": {"a": "../../../secret.safetensors"}}
    config = (saved / "config.json").read_bytes()
    files = {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode()}
    hub.repos["someone/empty"].commit(files)
    assert "files that lie beside it" in refused(client("AutoModel.from_pretrained('someone/empty')"))


def test_a_cache_that_huggingface_hub_laid_out(hub: Hub, tmp_path: Path) -> None:
    """Symbolic links from snapshots to blobs, made by another program; read by this process without a hub."""
    for file in hub.repos["someone/vit-tiny"].commits[hub.repos["someone/vit-tiny"].branches["main"]]:
        hf_hub_download("someone/vit-tiny", file, cache_dir=tmp_path, endpoint=hub.url)
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    folder = locate("someone/vit-tiny", **where)
    assert (folder / "config.json").is_symlink()
    model = ViTForImageClassification.from_pretrained("someone/vit-tiny", **where)
    assert total(model) == total(tiny(ViTForImageClassification))
    shard = next(folder.glob("model-00002*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not in the cache; local_files_only=True"):
        ViTForImageClassification.from_pretrained("someone/vit-tiny", **where)


def test_up_and_down_again(hub: Hub, client: Client) -> None:
    """One commit; what an earlier upload left goes; a card that is there stays."""
    code = f"""
torch.manual_seed(0)
config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16,
    patch_size=4, num_labels=3)
from vitscale.models.auto import initialize
model = ViTForImageClassification(config)
initialize(model, 1)
processor = ViTImageProcessor(size=16)
def push(**options):
    return model.push_to_hub('me/up', token={TOKEN!r}, **options)
"""
    done(client(code))
    url = done(client("value = push(processor=processor, max_shard_size='4KB', private=True)"))
    repo = hub.repos["me/up"]
    assert url == f"{hub.url}/me/up/commit/{repo.branches['main']}"
    assert repo.private
    files = repo.commits[repo.branches["main"]]
    assert sorted(name for name in files if "-of-" not in name) == [
        ".gitattributes", "README.md", "config.json", "model.safetensors.index.json", "preprocessor_config.json",
    ]  # fmt: skip
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert "license" not in card.data.to_dict()
    load = f"value = total(AutoModel.from_pretrained('me/up', token={TOKEN!r})) == total(model.vit)"
    assert done(client(load))

    repo.commit({**files, "README.md": b"My own card"})
    done(client("push(commit_message='again')"))
    files = repo.commits[repo.branches["main"]]
    assert not any("-of-" in name or name.endswith("index.json") for name in files)
    assert files["README.md"] == b"My own card"
    assert repo.messages[-1] == "again"
    assert done(client(load))

    before = dict(repo.branches)
    done(client("push(revision='tuned')"))
    assert repo.branches["main"] == before["main"]
    assert "tuned" in repo.branches
    assert "/discussions/1" in done(client("value = push(create_pr=True)"))


def test_up_is_refused(client: Client) -> None:
    model = "ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))"
    up = "%s.push_to_hub(%r, token=%r)"
    assert "pass a token that may write there" in refused(client(up % (model, "me/x", "hf_wrong")))
    assert "pass a token that may write there" in refused(client(up % (model, "others/x", TOKEN)))
    assert "is no name" in refused(client(up % (model, "me/x--y", TOKEN)))
    assert "is no run's folder" in refused(client(f"{model}.push_to_hub('me/x', run='.')"))


def test_an_mae_goes_up_with_its_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    """The card of a run (test_model_card.py reads it); the run's processor goes along."""
    model = tiny(ViTMAEForPreTraining)
    model.save_pretrained(tmp_path / "model")
    processor = json.dumps(processor_dict(model.config, (0.1, 0.2, 0.3), (0.5,)))
    (tmp_path / "model" / "preprocessor_config.json").write_text(processor)
    (tmp_path / "config.yaml").write_text("run: {name: mine}\ndata: {train: 'shards/*.tar'}\n")
    push = f"ViTMAEForPreTraining.from_pretrained({str(tmp_path)!r}).push_to_hub('me/mae', token={TOKEN!r}, run=%r)"
    done(client(push % str(tmp_path)))
    repo = hub.repos["me/mae"]
    files = repo.commits[repo.branches["main"]]
    assert json.loads(files["preprocessor_config.json"])["image_mean"] == [0.1, 0.2, 0.3]
    assert b"shards/*.tar" in files["README.md"]
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert "vitscale export" in refused(client(push % str(tmp_path)))
