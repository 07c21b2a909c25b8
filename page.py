"""
A page as a list of blocks, written from this one source as Markdown and as one HTML file that needs nothing else.

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
Table = namedtuple("Table", "name columns rows records", defaults=(None,)) # rows of texts and Cells
Cell = namedtuple("Cell", "text small bold", defaults=("", False)) # small: a second line
Picture = namedtuple("Picture", "name png caption") # png: the bytes of the file

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1.5em }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc; padding-bottom: .2em }
p { max-width: 70em } .scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .5em 0 1em; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
th { border-bottom: 1px solid #888; vertical-align: bottom } td { white-space: nowrap } small { color: #666 }
th:first-child, td:first-child, td.text { text-align: left } td.text { white-space: normal; max-width: 60em }
figure { margin: 1.5em 0 } figure img { max-width: 100%; height: auto }
figcaption { color: #444; font-size: 13px; max-width: 70em }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px; line-height: 1.4 }
"""


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
        return f"![{block.name}](figures/{block.name}.png)\n\n*{md(block.caption)}*"
    lines = [block.columns, ["---"] * len(block.columns), *block.rows]
    return "\n".join(f"| {' | '.join(map(md_cell, line))} |" for line in lines)


def html_cell(cell):
    cell = as_cell(cell)
    text = html.escape(cell.text)
    if cell.bold:
        text = f"<b>{text}</b>"
    if cell.small:
        text += f"<br><small>{html.escape(cell.small)}</small>"
    return f"<td class=text>{text}</td>" if len(cell.text) > 40 else f"<td>{text}</td>"


def html_of(block):
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Pre):
        text = f"<pre>{html.escape(block.text)}</pre>"
        return f"<details><summary>{html.escape(block.summary)}</summary>{text}</details>" if block.summary else text
    if isinstance(block, Picture):
        caption, data = html.escape(block.caption), base64.b64encode(block.png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    head = "".join(f"<th>{html.escape(column)}</th>" for column in block.columns)
    rows = "".join(f"<tr>{''.join(map(html_cell, row))}</tr>\n" for row in block.rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"


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
    Write index.md and index.html, tables/<name>.csv of each Table (its records, or its texts where it has none), and
    figures/<name>.png of each Picture. Raises SystemExit where the disk does not take them.
    """
    for name in ("tables", "figures"):
        path = os.path.join(folder, name)
        with explained(path):
            os.makedirs(path, exist_ok=True)
    for block in blocks:
        if isinstance(block, Table):
            records = block.records
            if records is None:
                records = [dict(zip(block.columns, map(text_of, row))) for row in block.rows]
            write_csv(os.path.join(folder, "tables", f"{block.name}.csv"), records)
        if isinstance(block, Picture):
            path = os.path.join(folder, "figures", f"{block.name}.png")
            with explained(path), replacing(path) as (f,):
                f.write(block.png)
    write(os.path.join(folder, "index.md"), as_utf8("\n\n".join(map(markdown, blocks)) + "\n"))
    title, body = html.escape(title), as_utf8("\n".join(map(html_of, blocks)))
    write(os.path.join(folder, "index.html"),
          f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
          f"<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n")
