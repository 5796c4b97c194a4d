"""`puna generate`: one prompt, one answer, on standard output."""

import sys
from typing import TYPE_CHECKING, Any

import typer

from puna.cli.memory import in_bytes, show_forecast, show_notes, show_used
from puna.cli.pictures import IMAGE_HELP, VIDEO_HELP, Album, check_files, with_parts
from puna.cli.ranks import one_of_many, prints

if TYPE_CHECKING:
    from puna.engine import Model


def generate(
    model: str = typer.Argument("cria", help="Bundled name, hub id, folder or file."),
    prompt: str | None = typer.Option(None, "--prompt", "-p", help="The text to continue; else standard input."),
    ids: str | None = typer.Option(None, "--ids", help='Token ids instead of text, as in "1,2,3"; taken as they are.'),
    chat: bool = typer.Option(False, "--chat/--raw", help="Ask the prompt as a chat message, or just continue it."),
    image: list[str] = typer.Option([], "--image", help=f"{IMAGE_HELP} Asks as with --chat."),
    video: list[str] = typer.Option([], "--video", help=f"{VIDEO_HELP} Asks as with --chat."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", "-n", min=1, help="Most tokens to generate."),
    temperature: float | None = typer.Option(None, "--temperature", "-t", help="0 always takes the likeliest token."),
    top_p: float | None = typer.Option(None, "--top-p", help="Draw from the likeliest tokens of this joint share."),
    top_k: int | None = typer.Option(None, "--top-k", help="Draw from the k likeliest tokens."),
    min_p: float | None = typer.Option(None, "--min-p", help="Drop tokens less likely than this part of the best."),
    seed: int | None = typer.Option(None, "--seed", help="Same seed, same answer."),
    stop: list[str] = typer.Option([], "--stop", help="End before this text. May be given several times."),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Go on past the model's own end."),
    device: str = typer.Option("cpu", "--device", help="Where to run, as torch names it."),
    dtype: str | None = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as stored."),
    context: int | None = typer.Option(None, "--context", help="Cap the context length, in tokens."),
    quantize: str | None = typer.Option(None, "--quantize", help="Weights in int8 or int4; default: as stored."),
    kv: str | None = typer.Option(None, "--kv", help="int8 keeps keys and values in 8 bits."),
    memory: float | None = typer.Option(None, "--memory", min=0.01, help="Most memory to use, in GB."),
    adapter: str | None = typer.Option(None, "--adapter", help="A PEFT adapter's folder, beside the weights."),
    expert_parallel: int | None = typer.Option(None, "--expert-parallel", min=1,
                                               help="Under torchrun: deal the experts out over this many processes."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object when done, instead of streaming."),
) -> None:
    """Continue a prompt once and print the result.

    Example: puna generate --prompt "The llama is" --max-tokens 40

    About a picture: puna generate PATH --image chart.png --prompt "What does it show?"

    Without a tokenizer: puna generate stories260K.bin --ids 1,2,3 --max-tokens 20

    Over two processes: torchrun --nproc-per-node 2 -m puna generate --prompt "The llama is" (the first one prints)
    """
    from puna.engine import Options, Sampling, load

    check_files([*image, *video])
    text_or_ids = _prompt(prompt, ids, chat or bool(image or video))
    options = Options(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
        stop=stop or None, ignore_eos=ignore_eos,
    )  # fmt: skip
    Sampling().with_options(options)  # a wrong flag is told before a long load
    quiet = not prints()
    llama = load(model, device=device, dtype=dtype, context=context, expert_parallel=expert_parallel, quantize=quantize,
                 kv=kv, memory=in_bytes(memory), tell=show_forecast, adapter=adapter)  # fmt: skip
    if not (quiet or as_json):
        show_notes(llama)
    if image or video:
        text_or_ids = _with_pictures(text_or_ids, llama, image, video)
    stream = llama.stream(text_or_ids, **options)
    speaks = llama.tokenizer is not None
    first = True
    for piece in stream:
        if as_json or quiet:
            continue
        shown = piece.text if speaks else "".join(f"{'' if first else ','}{id}" for id in piece.token_ids)
        first = first and not shown
        sys.stdout.write(shown)
        sys.stdout.flush()
    if quiet:
        return
    if as_json:
        _print_json(stream.reply, llama)
    else:
        sys.stdout.write("\n")
    show_used(llama)


def _prompt(prompt: str | None, ids: str | None, chat: bool) -> Any:
    """The prompt as `Model.stream` takes it, from the options or standard input."""
    from puna.errors import PunaError

    if ids is not None:
        if prompt is not None or chat:
            raise PunaError("--ids stands alone: leave out --prompt and --chat")
        try:
            return [int(part) for part in ids.replace(",", " ").split()]
        except ValueError:
            raise PunaError(f'--ids must be whole numbers with commas, as in "1,2,3", not {ids!r:.80}') from None
    if prompt is None:
        if sys.stdin.isatty() or one_of_many():  # torchrun's processes can't all read the same input
            raise PunaError('there is no prompt: give --prompt "TEXT", --ids "1,2,3", or pipe text in')
        prompt = sys.stdin.read().removesuffix("\n")
    return [{"role": "user", "content": prompt}] if chat else prompt


def _with_pictures(messages: Any, llama: "Model", images: list[str], videos: list[str]) -> Any:
    album = Album(llama)
    parts = [*(album.add("image", file) for file in images), *(album.add("video", file) for file in videos)]
    for note in album.notes:
        print(note, file=sys.stderr)
    return album.shown([{"role": "user", "content": with_parts(parts, messages[0]["content"])}])


def _print_json(reply: Any, llama: "Model") -> None:
    """One reply as a JSON object on one line."""
    import json

    usage = reply.usage
    forecast, peak = llama.memory_used()
    record = {
        "text": reply.text,
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "memory": {"forecast": forecast and forecast.record(), "peak": peak},
    }
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
