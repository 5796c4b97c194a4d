"""`puna pull`: fetch a checkpoint and say where it lies."""

import json as json_module

import typer


def pull(
    model: str = typer.Argument(..., help="Hub repository org/name, or org/name:file.gguf for one GGUF file."),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Download a checkpoint from a hub into its cache; what is there already is not fetched again.

    Example: puna pull meta-llama/Llama-3.2-1B-Instruct
    """
    from puna.checkpoint.hub import licence_of, resolve, size_of

    path = resolve(model, revision)
    licence, size = licence_of(path), size_of(path)
    if json:
        typer.echo(json_module.dumps({"path": str(path), "bytes": size, "license": licence}))
        return
    typer.echo(f"{path}")
    typer.echo(f"{size:,} bytes")
    typer.echo(f"licence: {licence}" if licence else "licence: not stated in a model card; ask where you got it")
