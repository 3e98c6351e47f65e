"""Models on the Hugging Face hub: down into huggingface_hub's cache, and up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's, or httpx2's, by the version: what a broken connection raises
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitscale.errors import CheckpointError
from vitscale.files.model_folder import CONFIG, INDEX, KINDS, PICKLE, PROCESSOR, WEIGHTS, is_weights, shards_of
from vitscale.text import did_you_mean

FAILURES = (OSError, HTTPError, HFValidationError, EntryNotFoundError)  # all that the two calls raise for a user
CARD = "README.md"
PATIENCE_S = 10.0  # for the hub's answer, as in huggingface_hub; after it the cache is tried
LISTED = 500  # models of an owner that are looked through for a name like a mistyped one


def download(
    name: str,
    revision: str | None,
    *,
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
    subfolder: str,
    only: str | None,
    advice: str,
) -> Path:
    """The folder of huggingface_hub's cache that holds a model, all files of one commit; see sources.locate.

    advice: what to add where there is no model of that name.
    """
    options = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    repository = _Repository(name, revision, subfolder, advice, options)
    listed = repository.listing()
    folder = repository.fetch(only or CONFIG, listed).parent
    if only is not None:
        return folder
    if listed is None:
        listed = {path.name for path in folder.iterdir()}
    if PROCESSOR in listed:
        repository.fetch(PROCESSOR, listed)
    weights = next((file for file in KINDS if file in listed), None)
    if weights is None:
        rest = f"; it has {', '.join(sorted(listed))}" if repository.unreachable is None else repository.unreachable
        raise CheckpointError(f"{repository.where}: has neither {WEIGHTS} nor {PICKLE}{rest}")
    path = repository.fetch(weights, listed)
    if weights.endswith(INDEX):
        for shard in shards_of(path):
            repository.fetch(shard, listed)
    return folder


class _Repository:
    """A repository's files; the first one settles the commit that the others come from."""

    def __init__(self, name: str, revision: str | None, subfolder: str, advice: str, options: dict[str, Any]) -> None:
        self.name, self.revision, self.subfolder, self.advice, self.options = name, revision, subfolder, advice, options
        self.where = f"{name}@{revision}" if revision else name
        self.commit: str | None = None
        # Why only the cache is read, where that is so.
        self.unreachable = "; local_files_only=True: only the cache was looked into" if self._local else None

    @property
    def _local(self) -> bool:
        return bool(self.options["local_files_only"])

    def listing(self) -> set[str] | None:
        """The names of the files in the model's folder; None where only the cache is to be asked.

        One question before any download: an unreachable hub is then known at once, where a download would
        try for half a minute, and no file has to be asked for that is not there.
        """
        if self._local:
            return None
        try:
            token = self.options["token"]
            info = HfApi().model_info(self.name, revision=self.revision, timeout=PATIENCE_S, token=token)
        except FAILURES as error:
            if not _out_of_reach(error):
                raise CheckpointError(self._reason(error, CONFIG)) from None
            self.unreachable = f"; the hub cannot be reached ({_line(error)}), so only the cache was looked into"
            self.options["local_files_only"] = True
            return None
        below = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        names = [each.rfilename for each in info.siblings or [] if each.rfilename.startswith(below)]
        return {name.removeprefix(below) for name in names if "/" not in name.removeprefix(below)}

    def fetch(self, file: str, listed: set[str] | None) -> Path:
        """A file's place in the cache. CheckpointError where it is not among those listed, or cannot be had."""
        if listed is not None and file not in listed and not self._local:
            raise CheckpointError(f"{self.where}: has no {self._within(file)}; it has {', '.join(sorted(listed))}")
        try:
            found = hf_hub_download(
                self.name,
                self._within(file),
                revision=self.commit or self.revision,
                **self.options,
            )
        except FAILURES as error:
            raise CheckpointError(self._reason(error, file)) from None
        path = Path(found)
        self.commit = self.commit or path.parts[-1 - len(Path(self._within(file)).parts)]
        return path

    def _within(self, file: str) -> str:
        return f"{self.subfolder.strip('/')}/{file}" if self.subfolder else file

    def _reason(self, error: Exception, file: str) -> str:
        if isinstance(error, HFValidationError):
            return f"{self.name}: no such folder{self.advice}, and no name that a model on the hub can have"
        if isinstance(error, LocalEntryNotFoundError):
            missing = f"; of a model of that name on the hub, {self._within(file)} is not in the cache"
            return f"{self.where}: no such folder{self.advice}{missing}{self.unreachable or ''}{self._cached()}"
        if isinstance(error, GatedRepoError):
            return f"{self.where}: its owner wants to be asked: do so on its page, then pass token or `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            near = _nearest_model(self.name, self.options["token"])
            private = "(or a private one: pass token, or `hf auth login`)"
            return f"{self.name}: no such folder{self.advice}, and no such model on the hub {private}{near}"
        if isinstance(error, RevisionNotFoundError):
            return f"{self.name}: has no revision {self.revision!r}{self._revisions()}"
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
            return f"{self.name}: the hub refuses the token; pass another token, or `hf auth login`"
        return f"{self.where}: {self._within(file)} cannot be had from the hub: {_line(error)}"

    def _cached(self) -> str:
        """The model in the cache whose name is most like this one."""
        cache = Path(self.options["cache_dir"] or constants.HF_HUB_CACHE)
        names = [path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*")]
        return did_you_mean(self.name, [name for name in names if name != self.name])

    def _revisions(self) -> str:
        try:
            refs = HfApi().list_repo_refs(self.name, token=self.options["token"])
        except FAILURES:
            return ""
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return did_you_mean(str(self.revision), names) or f"; it has {', '.join(names[:10])}"


def _out_of_reach(error: Exception) -> bool:
    """No connection, offline mode, or a hub that is down: what the cache may make good."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, HTTPError | ConnectionError)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _nearest_model(name: str, token: str | bool | None) -> str:
    """The model on the hub whose name is most like this one: of the same owner, or of that name."""
    owner, _, own = name.rpartition("/")
    try:
        found: Iterable[Any] = HfApi().list_models(author=owner, limit=LISTED, token=token) if owner else []
        names = [model.id for model in found]
        names += [model.id for model in HfApi().list_models(search=own, limit=LISTED, token=token)]
    except FAILURES:
        return ""
    return did_you_mean(name, names)


def upload(
    folder: Path,
    name: str,
    *,
    new_card: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    """A model's folder as one commit, to a repository and branch made where there are none; gives its URL.

    Weights of an earlier upload that are not among the new files go; a card that is there stays but for
    new_card. CheckpointError with what the hub says where it refuses.
    """
    hub = HfApi(token=token)
    try:
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            hub.create_branch(name, branch=revision, exist_ok=True)
        there = {each.rfilename for each in hub.model_info(name, revision=revision).siblings or []}
        files = {path.name: path for path in folder.iterdir()}
        if CARD in there and not new_card:
            del files[CARD]
        old = [file for file in there if is_weights(file) and file not in files]
        changes = [CommitOperationAdd(file, path) for file, path in sorted(files.items())]
        done = hub.create_commit(
            name,
            [*changes, *(CommitOperationDelete(file) for file in sorted(old))],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
        return str(done.pr_url or done.commit_url)
    except FAILURES as error:
        if isinstance(error, HFValidationError):
            raise CheckpointError(f"{name}: is no name that a model on the hub can have: {_line(error)}") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        way = "; pass a token that may write there, or `hf auth login`" if status in (401, 403) else ""
        raise CheckpointError(f"{name}: cannot be uploaded to the hub: {_line(error)}{way}") from None
