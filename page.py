"""
A page as a list of blocks, written from this one source as Markdown and as one HTML file that needs nothing else, with
each table as CSV and LaTeX, and each figure as SVG and PDF, beside it.

    write_page("report", "Title", [Heading("Title", 1), Paragraph("Text."), Table("name", ["a", "b"], [["1", "2"]])])
"""
import base64
import csv
import html
import io
import os
from collections import namedtuple

from data import replacing
from safe import explained, write

Heading = namedtuple("Heading", "text level", defaults=(2,))
Paragraph = namedtuple("Paragraph", "text")
Pre = namedtuple("Pre", "text summary", defaults=("",)) # with a summary it is folded away in HTML
# rows of texts and Cells; records are what its CSV holds; with a summary it is folded away in HTML
Table = namedtuple("Table", "name columns rows records summary", defaults=(None, ""))
Cell = namedtuple("Cell", "text small bold", defaults=("", False)) # small: a second line
Picture = namedtuple("Picture", "name svg pdf caption") # svg, pdf: the bytes of the files

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1.5em; overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc; padding-bottom: .2em }
p { max-width: 70em }
.scroll { overflow-x: auto; margin: .5em 0 1em } .scroll:focus-visible { outline: 2px solid #14397d }
.wide::before { content: "scroll sideways \\2192"; position: sticky; left: 0; font-size: 12px; color: #666 }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
th { border-bottom: 1px solid #888; vertical-align: bottom } td { white-space: nowrap } small { color: #666 }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
.text { text-align: left } td.text { white-space: normal; min-width: 22em; max-width: 60em }
th button { all: unset; cursor: pointer } th button:hover { text-decoration: underline }
th button:focus-visible { outline: 2px solid #14397d }
[aria-sort=ascending] button::after { content: " \\25b2" } [aria-sort=descending] button::after { content: " \\25bc" }
figure { margin: 1.5em 0 } figure img { max-width: max(100%, 660px); height: auto }
figcaption { color: #444; font-size: 13px; max-width: 70em }
summary { cursor: pointer; margin: .5em 0 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px; line-height: 1.4 }
@media (max-width: 600px) {
  body { margin: 1em auto; padding: 0 .8em } h1 { font-size: 1.5em } th, td { padding: .3em .5em }
  td:first-child { white-space: normal; min-width: 7em; max-width: 38vw } td.text { min-width: 15em }
}
"""
# what a click or a key does, and the hint at tables that are wider than the screen; without it the page is as readable
_SCRIPT = """
const value = text => {
  const number = text.match(/^[+-]?[\\d,]*\\.?\\d+(e[+-]?\\d+)?/i)
  return number ? parseFloat(number[0].replaceAll(",", "")) : NaN
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], titles = [...table.tHead.rows[0].cells]
  titles.forEach((title, column) => {
    const button = document.createElement("button")
    button.append(...title.childNodes)
    title.append(button)
    button.onclick = () => {
      const text = row => row.cells[column].innerText.trim()
      const sign = title.getAttribute("aria-sort") === "ascending" ? -1 : 1
      titles.forEach(other => other.removeAttribute("aria-sort"))
      title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending")
      const rows = [...body.rows], full = rows.filter(text), empty = rows.filter(row => !text(row))
      const numbers = full.every(row => !isNaN(value(text(row))))
      const order = numbers ? (a, b) => value(text(a)) - value(text(b)) : (a, b) => text(a).localeCompare(text(b))
      full.sort((a, b) => sign * order(a, b))
      body.append(...full, ...empty)
    }
  })
}
const hint = () => document.querySelectorAll(".scroll").forEach(
  box => box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1))
addEventListener("resize", hint)
document.addEventListener("toggle", hint, true)
hint()
"""
# what LaTeX would take for something else, in text
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "\n": " "})


def as_cell(cell):
    return Cell(cell) if isinstance(cell, str) else cell


def text_of(cell):
    return as_cell(cell).text


def md(text):
    return text.replace("<", "&lt;")


def md_cell(cell):
    cell = as_cell(cell)
    text = md(f"{cell.text} {cell.small}".strip()).replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if cell.bold else text


def markdown(block):
    if isinstance(block, Heading):
        return f"{'#' * block.level} {md(block.text)}"
    if isinstance(block, Paragraph):
        return md(block.text)
    if isinstance(block, Pre):
        return f"{block.summary}\n\n```\n{block.text}\n```".strip()
    if isinstance(block, Picture):
        return f"![{block.name}](figures/{block.name}.svg)\n\n*{md(block.caption)}*"
    lines = [block.columns, ["---"] * len(block.columns), *block.rows]
    text = "\n".join(f"| {' | '.join(map(md_cell, line))} |" for line in lines)
    return f"{block.summary}\n\n{text}" if block.summary else text


def html_cell(cell, is_text):
    cell = as_cell(cell)
    text = html.escape(cell.text)
    if cell.bold:
        text = f"<b>{text}</b>"
    if cell.small:
        text += f"<br><small>{html.escape(cell.small)}</small>"
    return f"<td class=text>{text}</td>" if is_text else f"<td>{text}</td>"


def html_of(block):
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Pre):
        return folded(block.summary, f"<pre>{html.escape(block.text)}</pre>")
    if isinstance(block, Picture):
        caption, data = html.escape(block.caption), base64.b64encode(block.svg).decode()
        image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure><div class=scroll tabindex=0>{image}</div><figcaption>{caption}</figcaption></figure>"
    texts = text_columns(block)
    head = "".join(f"<th{' class=text' * is_text}>{html.escape(column)}</th>"
                   for column, is_text in zip(block.columns, texts))
    rows = "".join(f"<tr>{''.join(map(html_cell, row, texts))}</tr>\n" for row in block.rows)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    label = html.escape(f"table {block.name}")
    return folded(block.summary, f'<div class=scroll tabindex=0 role=region aria-label="{label}">{table}</div>')


def text_columns(table):
    """Of each column, whether it is of sentences, which are set in lines."""
    longest = [0] * len(table.columns)
    for row in table.rows:
        longest = [max(most, *map(len, as_cell(cell)[:2])) for most, cell in zip(longest, row)] # of text and small
    return [most > 40 for most in longest]


def folded(summary, text):
    return f"<details><summary>{html.escape(summary)}</summary>{text}</details>" if summary else text


def latex_cell(cell):
    cell = as_cell(cell)
    text = f"{cell.text} {cell.small}".strip().translate(_LATEX)
    return rf"\textbf{{{text}}}" if cell.bold else text


def latex(table):
    """A tabular of the table, for \\input. It needs no package."""
    kinds = ["l", *["p{6cm}" if is_text else "r" for is_text in text_columns(table)[1:]]]
    lines = [" & ".join(map(latex_cell, line)) + r" \\" for line in (table.columns, *table.rows)]
    return "\n".join([rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
                      r"\end{tabular}", ""])


def number(x, spec):
    """x in digits; large numbers in full."""
    if x is None:
        return ""
    if "g" in spec and abs(x) >= 1000:
        return f"{x:+,.0f}" if "+" in spec else f"{x:,.0f}"
    return f"{x:{spec}}"


def shown(metric, mean, std):
    """mean ± std in the metric's unit, both to its digits."""
    if mean is None:
        return ""
    text = number(metric.scale * mean, metric.spec)
    if std is None:
        return text
    return f"{text} ± {number(metric.scale * std, metric.spec.lstrip('+').replace('.3g', '.2g'))}"


def write_csv(path, records):
    """records: dicts, whose keys together are the columns. Raises SystemExit where the disk does not take the file."""
    columns, text = {}, io.StringIO()
    for record in records:
        columns.update(record)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write(path, as_utf8(text.getvalue()))


def as_utf8(text):
    """The text with ? for what utf-8 does not have: the name of a folder may hold any bytes."""
    return text.encode(errors="replace").decode()


def write_page(folder, title, blocks):
    """
    Write index.md and index.html, tables/<name>.csv and .tex of each Table (of its records, or of its texts where it
    has none), and figures/<name>.svg and .pdf of each Picture. Raises SystemExit where the disk does not take them.
    """
    for name in ("tables", "figures"):
        path = os.path.join(folder, name)
        with explained(path):
            os.makedirs(path, exist_ok=True)
    for block in blocks:
        if isinstance(block, Table):
            records, path = block.records, os.path.join(folder, "tables", block.name)
            if records is None:
                records = [dict(zip(block.columns, map(text_of, row))) for row in block.rows]
            write_csv(f"{path}.csv", records)
            write(f"{path}.tex", as_utf8(latex(block)))
        if isinstance(block, Picture):
            for kind, data in (("svg", block.svg), ("pdf", block.pdf)):
                path = os.path.join(folder, "figures", f"{block.name}.{kind}")
                with explained(path), replacing(path) as (f,):
                    f.write(data)
    write(os.path.join(folder, "index.md"), as_utf8("\n\n".join(map(markdown, blocks)) + "\n"))
    title, body = html.escape(title), as_utf8("\n".join(map(html_of, blocks)))
    write(os.path.join(folder, "index.html"),
          f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
          '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
          f"<style>{_CSS}</style></head>\n<body>\n{body}\n<script>{_SCRIPT}</script>\n</body></html>\n")
