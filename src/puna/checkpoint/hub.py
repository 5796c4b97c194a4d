"""Names to files: paths, the bundled model, and repositories on a hub (Hugging Face's, or what HF_ENDPOINT names).

Downloads are huggingface_hub's own: its cache (HF_HOME), resume, progress, login, offline mode (HF_HUB_OFFLINE).
"""

import re
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from puna.errors import PunaError

BUNDLED = ("cria",)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")
# Files at the top of a repository. Meta's own files (original/) repeat the same weights and are fetched only instead.
_CHECKPOINT = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "USE_POLICY*"]
_META = ["*consolidated.*.pth", "*_scales_*.pt", "*params.json", "*tokenizer.model"]


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The file or folder behind a name: an existing path, "cria", "org/name" or "org/name:file.gguf" on a hub.

    Hub repositories come from the local cache where they are complete, and are downloaded where not. `revision` is a
    branch, tag or commit of a hub repository.

    Raises:
        PunaError: nothing of that name; a gated or missing repository; offline and not in the cache; a broken download.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and _exists(path):
        return path
    if name in BUNDLED:
        return _bundled(name)
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith((".", "~")):
        raise PunaError(
            f"{name!r} is no file or folder here, and no bundled model. Give a path to a checkpoint, "
            f"{' or '.join(map(repr, BUNDLED))}, or a hub repository as 'org/name' or 'org/name:file.gguf'."
        )
    return _Repository(match["repo"], revision).fetch(match["file"])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is longer than any file's
        return False


def licence_of(path: Path) -> str | None:
    """The licence that the model card beside a checkpoint states in its header, or None."""
    folders = (path, path.parent) if path.is_dir() else (path.parent,)
    card = next((f / "README.md" for f in folders if (f / "README.md").is_file()), None)
    if card is None:
        return None
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name): *(\S.*?) *$", header[1], re.MULTILINE)) if header else {}
    # the hub's own word for "see license_name" is "other"
    return stated.get("license_name") or stated.get("license")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _bundled(name: str) -> Path:
    path = Path(str(files("puna"))) / "data" / name
    if not path.exists():
        raise PunaError(f"the bundled model {name!r} is missing from this installation; install puna again")
    return path


class _Repository:
    """One repository at one revision, with every failure turned into an error that says what to do."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo, self.revision = repo, revision

    def fetch(self, file: str | None) -> Path:
        if file is not None:
            target = self.download([file, "README.md"]) / file
            if not target.is_file():
                raise PunaError(f"{self.repo} has no file {file!r}.{self.offered()}")
            return target
        folder = self.download(_CHECKPOINT, ignore=["*/*"])
        if any(folder.glob("*.safetensors")):
            return folder
        folder = self.download(_META)
        for place in (folder, folder / "original"):
            if any(place.glob("consolidated.*.pth")):
                return place
        found = sorted(self.names())
        single = [name for name in found if name.endswith(".gguf")]
        if len(single) == 1:
            return self.fetch(single[0])
        raise PunaError(f"{self.repo} has no safetensors and none of Meta's consolidated.*.pth.{self.offered()}")

    def offered(self) -> str:
        """Which GGUF files the repository has, as a sentence to end an error with."""
        ggufs = sorted(name for name in self.names() if name.endswith(".gguf"))
        if not ggufs:
            return " It has no GGUF file either; choose another repository."
        more = f" and {len(ggufs) - 8} more" if len(ggufs) > 8 else ""
        return f" Choose one of its GGUF files: {', '.join(f'{self.repo}:{name}' for name in ggufs[:8])}{more}."

    def names(self) -> list[str]:
        """All file names of the repository; offline those in the cache."""
        from huggingface_hub import HfApi, constants

        if constants.is_offline_mode():
            folder = self.download(["*.gguf", "README.md"])
            return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return self.guarded(lambda: HfApi().list_repo_files(self.repo, revision=self.revision))

    def download(self, allow: list[str], ignore: list[str] | None = None) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            self.guarded(
                lambda: snapshot_download(
                    self.repo, revision=self.revision, allow_patterns=allow, ignore_patterns=ignore,
                    library_name="puna"
                )
            )
        )  # fmt: skip

    def guarded(self, call):  # type: ignore[no-untyped-def]
        """Run a call to the hub. The order matters: the special errors derive from the general ones."""
        from huggingface_hub import constants, errors

        host = urlsplit(constants.ENDPOINT).hostname or "the hub"
        try:
            return call()
        except errors.HFValidationError as error:
            raise PunaError(f"{self.repo!r} is no name of a hub repository (org/name)") from error
        except errors.GatedRepoError as error:
            raise PunaError(
                f"{self.repo} is gated. Accept its licence on its page on {host}, then log in with `hf auth login` "
                "(or set HF_TOKEN) and pull again."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise PunaError(
                f"{self.repo}: no such file or folder here, and no such repository on {host}. Check the spelling; a "
                "private one needs `hf auth login` (or HF_TOKEN)."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise PunaError(f"{self.repo} has no revision {self.revision!r}; give a branch, tag or commit") from error
        except errors.LocalEntryNotFoundError as error:
            raise self.unreachable(host, error) from error
        except errors.HfHubHTTPError as error:
            raise self.refused(host, error.response.status_code) from error
        except (errors.HTTPError, OSError) as error:
            raise PunaError(
                f"{self.repo}: the download from {host} broke off ({type(error).__name__}). "
                "Pull again: files that are complete are not fetched twice."
            ) from error

    def unreachable(self, host: str, error: Exception) -> PunaError:
        from huggingface_hub import constants, errors

        if constants.is_offline_mode():
            return PunaError(
                f"{self.repo} is not (completely) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. "
                "Unset it and pull once, or give a path."
            )
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            return self.refused(host, cause.response.status_code)
        return PunaError(
            f"{self.repo} is not in the cache, and {host} cannot be reached. Check the network (and HF_ENDPOINT), "
            "or give a path."
        )

    def refused(self, host: str, status: int) -> PunaError:
        if status in (401, 403):
            return PunaError(
                f"{host} refuses access to {self.repo} ({status}). Log in with `hf auth login` (or set HF_TOKEN), and "
                "accept the licence on its page where it is gated."
            )
        return PunaError(f"{host} answered {status} for {self.repo}; try again later")
