"""Where pictures of a request may come from: the request itself, and what whoever runs the server allows beside it.

An address is fetched only from a named host, and never from a private, loopback or link-local one that a name or a
redirect leads to: such a host trusts this machine, not the client.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from puna.engine.picture_parts import source_of
from puna.errors import PunaError

SECONDS = 20.0  # for one picture, redirects included
REDIRECTS = 3
BYTES = 64 * 2**20
PORTS = {"http": 80, "https": 443}
ANY = "*"


class Allowed:
    """Where pictures may be read from beside data URLs.

    places: folders, whose files may be named by file: URLs, and origins such as https://images.example.org, or
    https://* for every public host. Raises PunaError for a place that is neither.
    """

    def __init__(self, places: Iterable[str] = ()) -> None:
        self.folders: list[Path] = []
        self.origins: set[tuple[str, str, int]] = set()
        for place in places:
            if place.startswith(("http://", "https://")):
                self.origins.add(_origin_of(place))
                continue
            folder = Path(place).expanduser().resolve()
            if not folder.is_dir():
                raise PunaError(f"--images-from {place} is no folder, and no origin such as https://images.example.org")
            self.folders.append(folder)

    def read(self, part: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """A picture part of a request (see `puna.text.pictures.PictureReader`), with what an address in it leads to in
        place of the address.

        Raises PunaError, naming the part, for what isn't allowed or can't be had.
        """
        source, _, field = source_of(part, where)
        if not isinstance(source, str):
            raise PunaError(f"{field}: a text is needed, with a data URL")
        scheme = source.partition(":")[0].lower()
        if scheme not in (*PORTS, "file"):
            return [dict(part)]
        found = self._file(source, field) if scheme == "file" else self._fetched(source, field)
        return [_replaced(part, source, found)]

    def _file(self, url: str, where: str) -> Path:
        if not self.folders:
            raise PunaError(f"{where}: this server reads no files; send the picture itself as a data URL")
        split = urlsplit(url)
        path = Path(unquote(split.path))
        if split.netloc not in ("", "localhost") or not path.is_absolute():
            raise PunaError(f"{where}: a file URL with an absolute path is needed, as in file:///pictures/llama.png")
        try:
            found = path.resolve()
            inside = any(found.is_relative_to(folder) for folder in self.folders)
            if inside and found.is_file():
                return found
        except (OSError, ValueError, RuntimeError):
            inside = False
        if inside:
            raise PunaError(f"{where}: there is no such file")
        raise PunaError(f"{where}: the path is outside of the folders that this server reads pictures from")

    def _fetched(self, url: str, where: str) -> bytes:
        until = time.monotonic() + SECONDS
        for _ in range(REDIRECTS + 1):
            split, port = _split(url, where)
            address = self._address(split, port, where)
            try:
                answer = _get(split, port, address, until)
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
                raise PunaError(f"{where}: {split.hostname} can't be reached ({why})") from None
            if isinstance(answer, bytes):
                return answer
            if isinstance(answer, str):
                raise PunaError(f"{where}: {split.hostname} {answer}")
            url = urljoin(url, answer.target)
        raise PunaError(f"{where}: more than {REDIRECTS} redirects; give the picture's own address")

    def _address(self, split: SplitResult, port: int, where: str) -> str:
        """The address to connect to, looked up once: what is checked is what is used."""
        scheme, host = split.scheme.lower(), (split.hostname or "").lower()
        named = (scheme, host, port) in self.origins
        literal = _literal(host)
        if literal is not None and not _public(literal) and not named:
            raise PunaError(f"{where}: {host} is a private, loopback or link-local address; nothing is fetched there")
        if not named and not ((scheme, ANY, port) in self.origins and port == PORTS[scheme]):
            raise PunaError(f"{where}: this server fetches no pictures from {scheme}://{split.netloc:.80}; send the "
                            "picture itself as a data URL")
        if literal is not None:
            return host
        try:
            found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            raise PunaError(f"{where}: the host {host:.80} is not known") from None
        for address in found:
            known = _literal(address)
            if known is None or not _public(known):
                raise PunaError(f"{where}: {host:.80} is at {address}, a private, loopback or link-local address; "
                                "nothing is fetched there")
        return found[0]


def _replaced(part: Mapping[str, Any], url: str, found: bytes | Path) -> dict[str, Any]:
    return {key: found if value is url else _replaced(value, url, found) if isinstance(value, Mapping) else value
            for key, value in part.items()}  # fmt: skip


class _Redirect:
    """An answer that leads on."""

    def __init__(self, target: str) -> None:
        self.target = target


def _get(split: SplitResult, port: int, address: str, until: float) -> bytes | str | _Redirect:
    """The content behind a URL, taken from `address`; a redirect; or in words what the host did instead."""
    host = split.hostname or ""
    connection = http.client.HTTPConnection(host, port, timeout=_left(until))
    sock = socket.create_connection((address, port), timeout=_left(until))
    line = sock.dup()  # of which TLS knows nothing
    # the time-out of a socket begins anew with each byte: whoever sends few holds out long
    end = threading.Timer(_left(until), _hang_up, [line])
    end.daemon = True
    end.start()
    try:
        if split.scheme.lower() == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        target = (split.path or "/") + (f"?{split.query}" if split.query else "")
        connection.request("GET", target, headers={"User-Agent": "puna", "Accept": "image/*, video/*",
                                                   "Accept-Encoding": "identity", "Host": split.netloc})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return _Redirect(answer.headers.get("location", ""))
        if answer.status != 200:
            return f"answers {answer.status} instead of a picture"
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            return "packs its answer, which was not asked for"
        found = bytearray()
        while piece := answer.read1(1 << 16):
            found += piece
            if len(found) > BYTES:
                return f"sends more than {BYTES:,} bytes"
        _left(until)
        return bytes(found)
    finally:
        end.cancel()
        connection.close()
        sock.close()
        line.close()


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):  # it is over already
        line.shutdown(socket.SHUT_RDWR)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took more than {SECONDS:g} seconds")
    return left


def _split(url: str, where: str) -> tuple[SplitResult, int]:
    try:
        split = urlsplit(url)
        port = split.port
    except ValueError:
        raise PunaError(f"{where}: {url!r:.80} is no valid address") from None
    bad = any(ord(character) <= 32 or ord(character) >= 127 for character in url)
    if bad or split.scheme.lower() not in PORTS or not split.hostname or split.username is not None:
        raise PunaError(f"{where}: only plain http(s) addresses are fetched from, without a user name")
    return split, port or PORTS[split.scheme.lower()]


def _origin_of(place: str) -> tuple[str, str, int]:
    try:
        split, port = _split(place, "--images-from")
    except PunaError as error:
        raise PunaError(f"{error}; an origin is needed, such as https://images.example.org, or a folder") from None
    if split.path not in ("", "/") or split.query:
        raise PunaError(f"--images-from {place}: an origin is needed, without a path: {split.scheme}://{split.netloc}")
    return split.scheme, (split.hostname or "").lower(), port


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, if it is one; an IPv4 address inside of an IPv6 one counts as itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return inner
        if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
