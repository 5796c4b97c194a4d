"""What users get wrong, as data: how it comes about, where it is given, and the exact words that they read then.

`docs/errors.md` is made of these tables; `test_bad_inputs.py` checks each row. Commands run in an empty folder in which
`make` has put the files, so names are relative and messages are the same everywhere.
"""

from typing import Any, NamedTuple

import torch

from bad_files import (
    GOOD,
    TOKENIZER,
    Evil,
    Make,
    adapter,
    checkpoint,
    config,
    cut,
    damaged_model,
    damaged_state,
    gguf,
    gguf_header,
    index,
    llama2c,
    locked,
    meta,
    nan,
    nothing,
    overlapping,
    port_taken,
    replaced,
    rows,
    tensors,
    truncated,
    two_files,
    without,
    written,
)

HOME = "/home/you/models"  # stands in the messages for the folder in which a command ran
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
BROKEN_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
TOOL = {"type": "function", "function": {"name": "sun"}}
HELLO = [{"role": "user", "content": "Hello"}]


class Command(NamedTuple):
    """One mistake at the command line; `code` 1 is for what the user can mend, 2 for wrong usage."""

    wrong: str
    make: Make
    command: str
    sees: str
    code: int = 1


class Request(NamedTuple):
    """One mistake in a request to `puna serve`; a body that is not bytes is sent as JSON."""

    wrong: str
    path: str
    body: dict[str, Any] | bytes | None
    status: int
    param: str | None
    code: str
    sees: str


GENERATE = "puna generate tiny --ids 1,2"
TRAIN = "puna train tiny --data rows.jsonl --out run"
RUN = f"{TRAIN} --config run.yaml"
CHAT, PLAIN = "POST /v1/chat/completions", "POST /v1/completions"

FILES: list[Command] = [
    Command("a safetensors file that ends early", truncated, GENERATE,
            "tiny/model.safetensors is truncated: tensor lm_head.weight ends at byte N, the file at N. Download the "
            "file again."),
    Command("two tensors in the same bytes", overlapping, GENERATE,
            "tiny/model.safetensors: tensor model.layers.0.mlp.up_proj.weight overlaps tensor "
            "model.layers.0.mlp.gate_proj.weight. Do not trust this file."),
    Command("an index that leads out of its folder", index("../others.safetensors"), GENERATE,
            "tiny/model.safetensors.index.json names '../others.safetensors', which leads out of tiny to "
            "/home/you/models/others.safetensors. Do not trust this file."),
    Command("a shard that is not there", index("model-00001-of-00002.safetensors"), GENERATE,
            "tiny/model-00001-of-00002.safetensors is missing, though tiny/model.safetensors.index.json lists it. "
            "Download the checkpoint again."),
    Command("several weight files and no index", two_files, GENERATE,
            "tiny holds 2 safetensors files but no model.safetensors.index.json, so nothing says which belong "
            "together. Download the index too."),
    Command("a tensor is missing", tensors(lambda w: w.pop("model.layers.0.mlp.up_proj.weight")), GENERATE,
            "tiny: the weights do not fit the configuration; missing layers.0.feed_forward.up_proj.weight. Check "
            "that the configuration belongs to these weights and that every file was downloaded."),
    Command("a tensor too many", tensors(lambda w: w.update(bias=torch.ones(3))), GENERATE,
            "tiny: the weights do not fit the configuration; not part of this architecture: tiny/model.safetensors, "
            "tensor bias. Check that the configuration belongs to these weights and that every file was downloaded."),
    Command("a tensor of the wrong shape", tensors(lambda w: w.update({"model.norm.weight": torch.ones(31)})), GENERATE,
            "tiny: the weights do not fit the configuration; misshapen: tiny/model.safetensors, tensor "
            "model.norm.weight has shape [31], needs [32]. Check that the configuration belongs to these weights and "
            "that every file was downloaded."),
    Command("NaN among the weights", tensors(nan), GENERATE,
            "tiny/model.safetensors, tensor model.layers.0.mlp.up_proj.weight holds NaN or infinite values. The file "
            "is damaged or its training diverged: fetch it again, or use an earlier checkpoint."),
    Command("integers for weights", tensors(lambda w: w.update({"model.norm.weight": torch.ones(32).char()})), GENERATE,
            "tiny/model.safetensors, tensor model.norm.weight: dtype I8 is not supported. Save it as one of F64, "
            "F32, F16, BF16."),
    Command("config.json is not JSON", replaced("config.json", '{"hidden_size": 32,'), GENERATE,
            "tiny/config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 20 "
            "(char 19). The download may be incomplete: fetch it again."),
    Command("config.json lacks a key", config(hidden_size=None), GENERATE,
            "tiny/config.json: hidden_size is missing. Mend it, or fetch the file again."),
    Command("config.json has text for a number", config(num_hidden_layers="one"), GENERATE,
            "tiny/config.json: num_hidden_layers must be an integer, not 'one'. Mend it, or fetch the file again."),
    Command("config.json describes an impossible model", config(num_key_value_heads=3), GENERATE,
            "tiny/config.json describes an impossible model: num_heads 4 is not a multiple of num_kv_heads 3. Mend "
            "it, or fetch the file again."),
    Command("config.json is of another family", config(architectures=["Qwen3ForCausalLM"]), GENERATE,
            "tiny/config.json: architecture 'Qwen3ForCausalLM' is not of this family. Choose another checkpoint. "
            "Supported: LlamaForCausalLM, Llama4ForCausalLM, Llama4ForConditionalGeneration, "
            "MllamaForConditionalGeneration."),
    Command("quantised in a way that isn't read", config(quantization_config={"quant_method": "gptq"}), GENERATE,
            "tiny/config.json: the weights are quantised (gptq), which is not supported; puna reads compressed-tensors "
            "and fbgemm_fp8. Load another release of this model, or a GGUF file of it."),
    Command("config.json is missing", without("config.json"), GENERATE,
            "tiny/config.json is missing. The download may be incomplete: fetch it again."),
    Command("a pickle with code in a .pth",
            meta(lambda folder: torch.save({"norm.weight": Evil()}, folder / "consolidated.00.pth")),
            "puna generate meta --ids 1,2",
            "meta/consolidated.00.pth holds more than weights, or is damaged. It was not opened: such files can run "
            "code. Fetch it again from where you trust it, or use a safetensors release."),
    Command("a .pth that ends early", meta(lambda folder: cut(folder / "consolidated.00.pth")),
            "puna generate meta --ids 1,2",
            "meta/consolidated.00.pth is truncated or no torch file (...). Download it again."),
    Command("params.json is missing", meta(lambda folder: (folder / "params.json").unlink()),
            "puna generate meta --ids 1,2",
            "meta/params.json is missing. Meta's weights need it: download it into the same folder."),
    Command("params.json lacks a key", meta(lambda folder: (folder / "params.json").write_text('{"n_layers": 2}')),
            "puna generate meta --ids 1,2",
            "meta/params.json: dim is missing. Mend it, or fetch the file again."),
    Command("a GGUF file that is none", gguf(lambda data: b"GGML" + data[4:]), "puna show tiny.gguf",
            "tiny.gguf: starts with b'GGML', not b'GGUF': this is not a GGUF file; fetch it again"),
    Command("a GGUF file that ends early", gguf(lambda data: data[:-2000]), "puna show tiny.gguf",
            "tiny.gguf: tensor 'output.weight' ends at byte N of a file of N bytes (near byte N); the file is "
            "damaged, fetch it again"),
    Command("a GGUF tensor of a type that isn't read", gguf_header("Q5_1"), "puna generate tiny.gguf --ids 1,2",
            "tiny.gguf: tensor 'blk.0.attn_v.weight' is stored as Q5_1; puna reads F32, F16, BF16, Q8_0, Q4_0, Q4_K, "
            "Q6_K. Fetch or make the file in one of these."),
    Command("a GGUF file of another family", gguf_header(general__architecture="qwen3"), "puna show tiny.gguf",
            "tiny.gguf: architecture 'qwen3' is not a Llama; give a file of 'llama' or 'llama4'"),
    Command("a GGUF file in parts", gguf_header(split__count=3), "puna show tiny.gguf",
            "tiny.gguf is one of 3 parts; join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"),
    Command("a llama2.c file that ends early", llama2c, "puna generate stories.bin --ids 1,2",
            "stories.bin is truncated: its header asks for N bytes, it has 5028. Fetch it again."),
    Command("Hugging Face weights as pickle", written("pytorch_model.bin", b"PK\3\4"), "puna show pytorch_model.bin",
            "pytorch_model.bin is in no known checkpoint format. Pickled Hugging Face weights are not read: save "
            "them as safetensors (`save_pretrained`)."),
    Command("tokenizer.model is damaged", damaged_model, GENERATE,
            "tiny/tokenizer.model: neither a sentencepiece model (cut off at byte 12) nor lines of 'base64 rank'; "
            "fetch the file again"),
    Command("tokenizer.json is cut off", replaced("tokenizer.json", '{"model": {"type": "BPE",'), GENERATE,
            "tiny/tokenizer.json, line 1: not valid JSON (Expecting property name enclosed in double quotes); fetch "
            "the file again"),
    Command("a broken chat template", replaced("chat_template.jinja", "{% for m in messages %}"),
            "puna generate tiny --chat --prompt Hello",
            "the checkpoint's chat template, line 1: ...; mend chat_template.jinja, or take it away to use the "
            "built-in format"),
    Command("an adapter, not a model", adapter, "puna show ./lora",
            "lora holds an adapter, not a whole model. Load the base model that it names."),
    Command("an empty folder", lambda here: (here / "empty").mkdir(), "puna generate empty --ids 1,2",
            "empty holds no checkpoint: no .safetensors, no consolidated.*.pth with params.json, no .gguf, no .bin. "
            "Name another folder, or fetch a checkpoint with `puna pull`."),
    Command("a file of another kind", written("notes.txt", "Remember the llama."), "puna show ./notes.txt",
            "notes.txt is in no known checkpoint format. Known are .safetensors, .gguf, Meta's consolidated.*.pth "
            "and llama2.c's .bin."),
    Command("a path that isn't there", nothing, "puna generate ./nowhere --ids 1,2",
            "'./nowhere' is no file or folder here, and no bundled model. Give a path to a checkpoint, 'cria', or a "
            "hub repository as 'org/name' or 'org/name:file.gguf'."),
    Command("a name that nothing has", nothing, "puna generate lama --ids 1,2",
            "'lama' is no file or folder here, and no bundled model. Give a path to a checkpoint, 'cria', or a hub "
            "repository as 'org/name' or 'org/name:file.gguf'."),
    Command("a member of the family misspelt", nothing, "puna show lama-3.1-8b",
            "there is no member 'lama-3.1-8b' in the Llama family. Did you mean llama-3.1-8b, llama-3.2-1b, "
            "llama-3-8b, llama-3.1-70b?"),
]

TRAINING: list[Command] = [
    Command("a row that is not JSON", rows(GOOD, '{"text": "cut off'), TRAIN,
            "rows.jsonl:2: not JSON: Unterminated string starting at, column 10; mend the line"),
    Command("a row with text and messages", rows(GOOD, '{"text": "a", "messages": []}'), TRAIN,
            "rows.jsonl:2: a row is an object with either `text` or `messages`, this has 'text', 'messages'; mend "
            "the line"),
    Command("a row with neither", rows('{"txt": "a"}'), TRAIN,
            "rows.jsonl:1: a row is an object with either `text` or `messages`, this has 'txt'; mend the line"),
    Command("an empty text", rows(GOOD, '{"text": ""}'), TRAIN,
            "rows.jsonl:2: text: must be a string that is not empty; mend or delete the line"),
    Command("a chat without an answer", rows('{"messages": [{"role": "user", "content": "Hello"}]}'), TRAIN,
            "rows.jsonl:1: messages: no assistant message to learn from; add one, or delete the line"),
    Command("a chat with an unknown role",
            rows('{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}'), TRAIN,
            "rows.jsonl:1: messages[0].role: 'wizard' is not a role; use system, user, assistant or tool"),
    Command("a file that is not UTF-8", written("rows.jsonl", b'{"text": "Gr\xfc\xdfe"}\n'), TRAIN,
            "rows.jsonl:1: not UTF-8 at byte 12 of the line; save the file as UTF-8"),
    Command("no such data file", checkpoint, TRAIN,
            "rows.jsonl: no such data file; --data names one, or the folder of those in --config"),
    Command("a wrong field in the YAML",
            rows(GOOD, yaml="steps: 10\nstages: [{sources: [{file: rows.jsonl}]}]\nlr: 1\n"), RUN,
            "run.yaml: lr: no such field; take it out, or use one of method, options, stages, steps, batch_tokens, "
            "micro_tokens, separate, dtype, device, mesh, context, recompute, optimizer, rate, matrix_rate, "
            "vector_rate, weight_decay, clip, warmup, decay, balancing, balance, seed, save_every, evaluate_every, "
            "domicile, heldout"),
    Command("a value out of range in the YAML",
            rows(GOOD, yaml="steps: 10\nstages: [{sources: [{file: rows.jsonl, weight: -1}]}]\n"), RUN,
            "run.yaml: stages.0.sources.0.weight: input should be greater than 0"),
    Command("held-out texts that aren't there",
            rows(GOOD, yaml="steps: 1\nheldout: none.jsonl\nstages: [{length: 8, sources: [{file: rows.jsonl}]}]\n"),
            RUN,
            "none.jsonl: no such file of held-out texts; mend `heldout`"),
    Command("a damaged state to resume from", damaged_state, f"{RUN} --resume",
            "run/state-00000001: the saved state is damaged (...); begin anew in another folder"),
    Command("YAML that doesn't parse", rows(GOOD, yaml="steps: [10\n"), RUN,
            "run.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'; mend the line"),
    Command("a folder of data without --config", rows(GOOD), "puna train tiny --data . --out run",
            "/home/you/models/rows.jsonl: a folder of text holds .txt and .md files alone; 6 are others: take them "
            "out, or name the files one by one in --config"),
    Command("one data file for a configuration of others",
            rows(GOOD, yaml="steps: 1\nstages: [{sources: [{file: chats.jsonl}]}]\n"), RUN,
            "--data is one file, but run.yaml names chats.jsonl: give their folder"),
    Command("nothing to begin from", rows(GOOD), "puna train shape --data rows.jsonl --out run",
            "'shape' is no file or folder here, and no bundled model. Give a path to a checkpoint, 'cria', or a hub "
            "repository as 'org/name' or 'org/name:file.gguf'."),
    Command("no tokenizer beside the shape",
            lambda here: [rows(GOOD)(here), *((here / "tiny" / name).unlink() for name in TOKENIZER)], TRAIN,
            "tiny: no tokenizer; put tokenizer.json or tokenizer.model beside config.json"),
    Command("an output folder in use by another run", locked, TRAIN,
            "run: another run is using this folder; wait for it or name another"),
    Command("an output folder that is not empty",
            lambda here: [rows(GOOD)(here), (here / "run").mkdir(), (here / "run" / "notes.txt").write_text("mine")],
            TRAIN,
            "run: the folder is not empty (notes.txt); add --resume to go on, or name another"),
    Command("an output folder that is a file",
            lambda here: [rows(GOOD)(here), (here / "run").write_text("mine")], TRAIN,
            "run: can't write into this folder: File exists; name another"),
]

FLAGS: list[Command] = [
    Command("a temperature below 0", checkpoint, f"{GENERATE} --temperature -1",
            "temperature must be at least 0, not -1"),
    Command("a top-p of 0", checkpoint, f"{GENERATE} --top-p 0",
            "top_p must be above 0 and at most 1, not 0"),
    Command("no token to generate", checkpoint, f"{GENERATE} --max-tokens 0",
            "Invalid value for '--max-tokens' / '-n': ...", 2),
    Command("a word for a number", checkpoint, f"{GENERATE} --seed lucky",
            "Invalid value for '--seed': ...", 2),
    Command("words for token ids", checkpoint, "puna generate tiny --ids one,two",
            "--ids must be whole numbers with commas, as in \"1,2,3\", not 'one,two'"),
    Command("a token id outside the vocabulary", checkpoint, "puna generate tiny --ids 1,9999",
            "token id 9999 at place 1 is outside this model's vocabulary (0 to 329)"),
    Command("text and ids at once", checkpoint, f"{GENERATE} --prompt Hello",
            "--ids stands alone: leave out --prompt and --chat"),
    Command("a prompt longer than the context", checkpoint, f"{GENERATE},3,4,5 --context 4",
            "the prompt has 5 tokens, but this model's context length is 4 tokens; shorten the prompt"),
    Command("a context longer than the model's", checkpoint, f"{GENERATE} --context 100000",
            "context 100000 is more than this model's context length of 64 tokens; give at most that"),
    Command("an unknown dtype", checkpoint, f"{GENERATE} --dtype float8",
            "dtype 'float8' is not known; use one of float32, bfloat16, float16, float64"),
    Command("an unknown device", checkpoint, f"{GENERATE} --device tpu",
            "device 'tpu' can't be used here: there is no such device; use cpu, cuda, cuda:1 or mps"),
    Command("a device that computes nothing", checkpoint, f"{GENERATE} --device meta",
            "device 'meta' can't be used here: ...; use device='cpu'"),
    Command("endless memory", checkpoint, f"{GENERATE} --memory inf",
            "--memory must be a number of GB, not inf; leave it out to take all that is available"),
    Command("text for a model without tokenizer", without(*TOKENIZER), "puna generate tiny --prompt Hello",
            "a text prompt needs a tokenizer, and this checkpoint has none; give token ids, or put the tokenizer's "
            "files beside the weights"),
    Command("a chat with a model without tokenizer", without(*TOKENIZER), "puna chat tiny",
            "chat needs a tokenizer, and tiny has none; use: puna generate tiny --ids 1,2,3"),
    Command("an unknown option", checkpoint, f"{GENERATE} --logit-soup 1",
            "No such option: --logit-soup", 2),
    Command("an unknown quantisation", checkpoint, f"{GENERATE} --quantize q4",
            "quantize 'q4' is not known; use int8 or int4, or leave it out"),
    Command("an unknown export format", checkpoint, "puna export tiny --out out --format onnx",
            "Invalid value for '--format': ...", 2),
    Command("an unknown export type", checkpoint, "puna export tiny --out out.gguf --format gguf --type Q3_K",
            "GGUF type 'Q3_K' is not one that can be written. Choose F32, F16, BF16, Q8_0, Q4_0."),
    Command("a type of GGUF for safetensors", checkpoint, "puna export tiny --out out --type Q8_0",
            "--type Q8_0 is not one of safetensors; choose F32, F16, BF16, or --format gguf"),
    Command("an export target that exists", checkpoint, "puna export tiny --out tiny",
            "tiny exists already. Choose another place, or delete it first."),
    Command("a port in use", port_taken, "puna serve tiny --port PORT",
            "port PORT on 127.0.0.1 is in use; choose another with --port, or --port 0 for a free one"),
    Command("a port that can't be", nothing, "puna serve tiny --port 99999",
            "Invalid value for '--port': ...", 2),
    Command("an address of another machine", nothing, "puna serve tiny --host 192.0.2.1 --port 0",
            "can't listen on 192.0.2.1 port 0: Cannot assign requested address; try --host 127.0.0.1 and a port from "
            "1024 on"),
    Command("no steps to train", rows(GOOD), f"{TRAIN} --steps 0",
            "Invalid value for '--steps': ...", 2),
    Command("a name that no hub has the form of", nothing, "puna pull llama",
            "'llama' is no file or folder here, and no bundled model. Give a path to a checkpoint, 'cria', or a hub "
            "repository as 'org/name' or 'org/name:file.gguf'."),
    Command("an unknown command", nothing, "puna chatt",
            "No such command 'chatt'. Did you mean 'chat'?", 2),
    Command("an argument left out", nothing, "puna show",
            "Missing argument ...", 2),
]

REQUESTS: list[Request] = [
    Request("not JSON", PLAIN, b'{"model": ', 400, None, "invalid_json",
            "We could not parse the JSON body of your request: Expecting value: line 1 column 11 (char 10)."),
    Request("a list for an object", PLAIN, b"[1]", 400, None, "invalid_type",
            "The body must be a JSON object."),
    Request("an unknown URL", "GET /v2/models", None, 404, None, "unknown_url",
            "Unknown request URL. The routes are /v1/chat/completions, /v1/completions, /v1/models and /health."),
    Request("an unknown model", CHAT, {"model": "gpt-9", "messages": HELLO}, 404, "model", "model_not_found",
            "The model 'gpt-9' does not exist. This server has 'llama-of-the-test'."),
    Request("no messages", CHAT, {}, 400, "messages", "missing_required_parameter",
            "Missing required parameter: 'messages'."),
    Request("an empty list of messages", CHAT, {"messages": []}, 400, "messages", "invalid_value",
            "Invalid value for 'messages': list should have at least 1 item after validation, not 0."),
    Request("an unknown field", CHAT, {"messages": HELLO, "colour": "red"}, 400, "colour", "unknown_parameter",
            "Unrecognized request argument supplied: colour"),
    Request("an unknown role", CHAT, {"messages": [{"role": "wizard", "content": "Hello"}]}, 400, "messages[0].role",
            "invalid_value",
            "Invalid value for 'messages[0].role': input should be 'developer', 'system', 'user', 'assistant' or "
            "'tool'."),
    Request("a message without content", CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content",
            "invalid_value",
            "messages[0].content: missing; only an assistant's message with tool_calls may go without"),
    Request("a picture for a model of text", CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, 400,
            "messages[0].content[0]", "invalid_value",
            "messages[0].content[0]: this model reads text only; leave the picture out or load a model with vision"),
    Request("arguments of a call that aren't JSON", CHAT,
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [BROKEN_CALL]}]}, 400,
            "messages[1].tool_calls[0].function.arguments", "invalid_value",
            "messages[1].tool_calls[0].function.arguments: not valid JSON (Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1))"),
    Request("a word for a number", CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature", "invalid_value",
            "Invalid value for 'temperature': input should be a valid number, unable to parse string as a number."),
    Request("a temperature out of range", CHAT, {"messages": HELLO, "temperature": 3}, 400, "temperature",
            "invalid_value",
            "Invalid value for 'temperature': input should be less than or equal to 2."),
    Request("a top_p of 0", CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p", "invalid_value",
            "Invalid value for 'top_p': input should be greater than 0."),
    Request("no answer asked for", CHAT, {"messages": HELLO, "n": 0}, 400, "n", "invalid_value",
            "Invalid value for 'n': input should be greater than or equal to 1."),
    Request("no token asked for", CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens", "invalid_value",
            "Invalid value for 'max_tokens': input should be greater than or equal to 1."),
    Request("top_logprobs without logprobs", CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs",
            "invalid_value",
            "top_logprobs is only allowed when logprobs is true."),
    Request("a tool of another type", CHAT, {"messages": HELLO, "tools": [{**TOOL, "type": "retrieval"}]}, 400,
            "tools[0].type", "invalid_value",
            "Invalid value for 'tools[0].type': input should be 'function'."),
    Request("a tool with a bad name", CHAT,
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "the sun"}}]}, 400,
            "tools[0].function.name", "invalid_value",
            "Invalid value for 'tools[0].function.name': string should match pattern '^[a-zA-Z0-9_.-]+$'."),
    Request("a tool whose parameters are no schema", CHAT,
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "sun", "parameters": 5}}]}, 400,
            "tools[0].function.parameters", "invalid_type",
            "Invalid value for 'tools[0].function.parameters': input should be a valid dictionary."),
    Request("a forced tool that isn't there", CHAT,
            {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "moon"}}},
            400, "tool_choice", "invalid_value",
            "tool_choice names the function 'moon', which is not among the tools."),
    Request("a forced tool without tools", CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice",
            "invalid_value",
            "tool_choice is only allowed when tools are given."),
    Request("a forced tool with an impossible schema", CHAT,
            {"messages": HELLO, "tool_choice": "required", "tools": [
                {"type": "function", "function": {"name": "sun", "parameters": {"properties": {"a": {"type": "x"}}}}}]},
            400, None, "invalid_value",
            "the schema can't be followed: ...; mend or simplify it"),
    Request("json_schema without a schema", CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, 400,
            "response_format.json_schema.schema", "missing_required_parameter",
            "Missing required parameter: 'response_format.json_schema.schema'."),
    Request("stream_options without stream", CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, 400,
            None, "invalid_value",
            "stream_options is only allowed when stream is true."),
    Request("a chat longer than the context", CHAT, {"messages": [{"role": "user", "content": "Hello" * 900}]}, 400,
            "messages", "context_length_exceeded",
            "This model's maximum context length is 900 tokens. However, your prompt has 4522 tokens. Please shorten "
            "it."),
    Request("a prompt longer than the context", PLAIN, {"prompt": [5] * 901}, 400, "prompt", "context_length_exceeded",
            "This model's maximum context length is 900 tokens. However, your prompt has 901 tokens. Please shorten "
            "it."),
    Request("an empty prompt", PLAIN, {"prompt": []}, 400, "prompt", "invalid_value",
            "'prompt' is an empty list: give text, token ids, or a list of either."),
    Request("a token id outside the vocabulary", PLAIN, {"prompt": [5, 99999]}, 400, None, "invalid_value",
            "token id 99999 at place 1 is outside this model's vocabulary (0 to 329)"),
    Request("a prompt of text and ids", PLAIN, {"prompt": [5, "a"]}, 400, "prompt", "invalid_value",
            "Invalid value for 'prompt': give text, a list of token ids (whole numbers from 0), or a list of either."),
]
