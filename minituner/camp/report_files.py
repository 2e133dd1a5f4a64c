"""A report on the terminal, as CSV, and as a page.

    print(table(report))                     one row a student, one column an exercise
    write(report, Path("report"))            report.csv, one row a grade; report.html, the table, with what was said

What students wrote is never trusted here either: names and sentences are escaped in the page, made harmless for
spreadsheets in the CSV (a cell that begins with = would be run), and freed of control characters on the terminal.
Lesson: the teacher's kit.
"""

from __future__ import annotations

import csv
import html
from pathlib import Path

from minituner.camp.report import Grade, Report

SIGNS = {"passed": "✓", "not yet": "✗", "not started": "·", "missing": "-"}
LEGEND = "✓ passed   ✗ not yet   · not started   - the notebook has no such cell"
STYLE = """body{font:15px sans-serif;margin:2em;color:#222}table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:4px 9px;text-align:center}th:first-child,td:first-child{text-align:left}
.passed{background:#cfe8f7}.not-yet{background:#fbe3c0}.missing,.not-started{color:#777}
dl{max-width:60em}dt{font-weight:bold;margin-top:1em}dd{margin:0 0 0 1em}"""


def printable(text: str) -> str:
    """The text on one line, without characters that steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def table(report: Report) -> str:
    """The class as a table of signs."""
    students = {student: printable(student)[:24] for student in report.students}
    width = max(map(len, students.values()))
    lines = ["  ".join([" " * width, *(f"{key:>4}" for key in report.keys)])]
    for student, shown in students.items():
        signs = (_sign(report.of(student, key)) for key in report.keys)
        count = f"{report.passed(student)} of {len(report.keys)}"
        lines.append("  ".join([f"{shown:{width}}", *(f"{sign:>4}" for sign in signs), f"  {count}"]))
    return "\n".join([*lines, "", LEGEND, f"seed {report.seed}; {report.walls}"])


def _sign(grade: Grade | None) -> str:
    return SIGNS[grade.state] if grade else ""


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.csv` and `report.html` into the folder, and return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_csv, as_page = folder / "report.csv", folder / "report.html"
    with as_csv.open("w", encoding="utf-8-sig", newline="") as stream:  # the mark lets Excel read Chinese names
        rows = csv.writer(stream)
        rows.writerow(["student", "exercise", "state", "what was said", "seed"])
        for grade in sorted(report.grades, key=lambda grade: (grade.student, report.keys.index(grade.key))):
            rows.writerow(map(_cell, (grade.student, grade.key, grade.state, grade.text, report.seed)))
    as_page.write_text(page(report), encoding="utf-8")
    return as_csv, as_page


def _cell(text: str) -> str:
    """A CSV cell that no spreadsheet takes for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def page(report: Report) -> str:
    """The report as one HTML page without scripts."""
    head = "".join(f"<th>{html.escape(key)}</th>" for key in report.keys)
    rows, said = [], []
    for student in report.students:
        name = html.escape(printable(student))
        grades = [report.of(student, key) for key in report.keys]
        rows.append(f"<tr><td>{name}</td>{''.join(map(_box, grades))}<td>{report.passed(student)}</td></tr>")
        lines = (f"<dd>{g.key}: {html.escape(printable(g.text))}</dd>" for g in grades if g and g.state == "not yet")
        said.append(f"<dt>{name}</dt>{''.join(lines)}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Camp report</title><style>{STYLE}</style>\n'
        f"<h1>Camp report</h1>\n<table><tr><th>student</th>{head}<th>passed</th></tr>\n"
        + "\n".join(rows)
        + "</table>\n"
        f"<p>{html.escape(LEGEND)}<br>seed {html.escape(report.seed)}; {html.escape(report.walls)}</p>\n"
        f"<h2>What was said</h2>\n<dl>{''.join(said)}</dl></html>\n"
    )


def _box(grade: Grade | None) -> str:
    if grade is None:
        return "<td></td>"
    state, said = grade.state.replace(" ", "-"), html.escape(printable(grade.text), quote=True)
    return f'<td class="{state}" title="{said}">{SIGNS[grade.state]}</td>'
