"""Runs in the interpreter where the peers are installed, which needn't be puna's: samples in on standard input, one
JSON object a line; results out on standard output."""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable

Scan = Callable[[str, str], "list[str] | None"]  # code, language -> CWEs; None for a language it doesn't know


def codeshield() -> Scan:
    """Code Shield as its users call it. Its semgrep runs get `--project-root /`, with which current semgrep scans no
    file; the option is taken out, so that the comparison is with Code Shield as it was meant."""
    from codeshield.insecure_code_detector import insecure_code_detector as detector
    from codeshield.insecure_code_detector.languages import Language
    from codeshield.insecure_code_detector.usecases import UseCase

    run = detector._run_command

    async def repaired(command: list[str]) -> str:
        if "--project-root" in command:
            at = command.index("--project-root")
            command = command[:at] + command[at + 2 :]
        return await run(command)

    detector._run_command = repaired

    def scan(code: str, language: str) -> list[str] | None:
        if language not in {member.value for member in Language}:
            return None
        issues = asyncio.run(detector.analyze(Language(language), code, usecase=UseCase.CODESHIELD))
        return [issue.cwe_id for issue in issues]

    return scan


def bandit() -> Scan:
    """bandit with all its tests, on a file, as it takes nothing else."""
    from bandit.core import config, manager

    configuration = config.BanditConfig()

    def scan(code: str, language: str) -> list[str] | None:
        if language != "python":
            return None
        with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
            file.write(code)
            file.flush()
            run = manager.BanditManager(configuration, "file", quiet=True)
            run.discover_files([file.name])
            run.run_tests()
        return [f"CWE-{issue.cwe.id}" for issue in run.get_issue_list()]

    return scan


def main() -> None:
    scan = {"codeshield": codeshield, "bandit": bandit}[sys.argv[1]]()
    out, sys.stdout = sys.stdout, sys.stderr  # what a peer prints isn't a result
    for line in sys.stdin:
        sample = json.loads(line)
        start = time.perf_counter()
        try:
            found = scan(sample["code"], sample["language"])
        except Exception as error:
            found = None
            print(f"{sample['id']}: {error!r}", file=sys.stderr)
        out.write(json.dumps({"found": found, "seconds": time.perf_counter() - start}) + "\n")
        out.flush()


main()
