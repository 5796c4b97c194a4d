"""`puna serve`: a model behind the OpenAI API."""

import errno
import ipaddress
import socket
from typing import Annotated, Any

import typer

from puna.cli.memory import in_bytes, show_forecast, show_notes, show_used
from puna.cli.ranks import refuse_many
from puna.errors import PunaError

GRACE_SECONDS = 5  # what is still answering after Ctrl-C may go on this long


def serve(
    model: Annotated[str, typer.Argument(help="Bundled name, hub id, folder or file.")] = "cria",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The name that clients call the model; MODEL by default.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Cap the context length, in tokens.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    quantize: Annotated[str | None, typer.Option(help="Weights in int8 or int4; as stored by default.")] = None,
    kv: Annotated[str | None, typer.Option(help="int8 keeps keys and values in 8 bits.")] = None,
    memory: Annotated[float | None, typer.Option(min=0.01, help="Most memory to use, in GB.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter's folder, beside the weights.")] = None,
    images_from: Annotated[list[str] | None, typer.Option(
        help="A folder whose pictures file: URLs may name, or an origin to fetch from, such as "
             "https://images.example.org (https://*: any public host). Repeatable; data URLs always work.")] = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's API.

    Point any OpenAI client at the printed URL; its API key may be anything. Ctrl-C ends the server.

    Example: puna serve cria --port 8000
    """
    refuse_many("serve")
    listener = _listen(host, port)
    with listener:
        settings = {"context": context, "dtype": dtype, "device": device, "quantize": quantize, "kv": kv,
                    "memory": in_bytes(memory), "adapter": adapter}  # fmt: skip
        _serve(listener, model, host, name or model, settings, images_from or [])


def _serve(
    listener: socket.socket, model: str, host: str, name: str, settings: dict[str, Any], images_from: list[str]
) -> None:
    import uvicorn

    from puna.engine import load
    from puna.server.app import LOOPBACK, create_app
    from puna.server.images import Allowed

    local = _is_loopback(host)
    pictures = Allowed(images_from)
    llama = load(model, tell=show_forecast, **settings)
    show_notes(llama)
    app = create_app(llama, name, hosts=(*LOOPBACK, host) if local else None, pictures=pictures)
    if not local:
        typer.secho(f"Warning: {host} can be reached from other machines, and there is no authentication yet: whoever "
                    "reaches this port can use the model. Use 127.0.0.1, or put a proxy with a password in front.",
                    fg="yellow", err=True)
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving {name} at http://{address}:{listener.getsockname()[1]}/v1")
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])
    show_used(llama)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model loads: a port in use should not cost the wait."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise PunaError(f"--host {host} is not an address of this machine ({error.strerror}); try 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PunaError(f"port {port} on {host} is in use; choose another with --port, or --port 0 for a free "
                            "one") from None
        raise PunaError(f"can't listen on {host} port {port}: {error.strerror}; try --host 127.0.0.1 and a port from "
                        "1024 on") from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
