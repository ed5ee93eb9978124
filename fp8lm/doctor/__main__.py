"""`python -m fp8lm.doctor [--json]`: a table of this machine, or the same as JSON.

Exit code 0 if training can run here, 2 with a line on stderr for every reason why it cannot.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import NoReturn

from fp8lm.doctor.gather import gather
from fp8lm.doctor.judge import Finding, judge, problems
from fp8lm.runtime.errors import EXIT_BAD_INPUT, CommandParser, run_command
from fp8lm.runtime.output import show


def main(argv: list[str]) -> int:
    """Print the report; see the top of this file for the exit code."""
    parser = CommandParser("python -m fp8lm.doctor", description="Can fp8lm train here?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    facts = gather()
    findings = judge(facts)
    found = problems(findings)
    if options.json:
        report = {"ok": not found, "problems": found, "findings": [asdict(f) for f in findings]}
        show(json.dumps({**report, "facts": asdict(facts)}, indent=2))
    else:
        show(f"fp8lm {facts.fp8lm}, {facts.revision}\n\n{table(findings)}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_BAD_INPUT if found else 0


def table(findings: list[Finding]) -> str:
    """Findings in columns: `-` before what is worth a look, `!` before problems."""
    marks = {"ok": " ", "note": "-", "problem": "!"}
    subjects = max(len(f.subject) for f in findings)
    founds = max(len(f.found) for f in findings)
    return "\n".join(
        f"{marks[f.status]} {f.subject:{subjects}}  {f.found:{founds}}  {_remark(f)}".rstrip()
        for f in findings
    )


def _remark(finding: Finding) -> str:
    return "see the error" if finding.status == "problem" else finding.remark  # on stderr


def command() -> NoReturn:
    """Run it as this process's command."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    command()
