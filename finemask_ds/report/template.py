"""The page's HTML and CSS: one file, no script, nothing from the network, light and dark, on paper too."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1b1c; --soft: #5a5e63; --paper: #ffffff; --line: #d5d8dc; --shade: #f3f4f6;
  --link: #0b57a4; --mark: #fff3c4; --bad: #a4260b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a7adb4; --paper: #15181b; --line: #3a3f45;
  --shade: #1f2327; --link: #8ab8f0; --mark: #4a3f14; --bad: #ff9a80; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: var(--link); text-underline-offset: .15em; }
a:focus-visible, .wide:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
nav ul { padding: 0; margin: 1rem 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .88rem; padding-top: .5rem;
  max-width: min(60rem, calc(100vw - 2rem)); position: sticky; left: 0; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); max-width: 11rem; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 500; min-width: 7.5rem; }
td small { display: block; color: var(--soft); font-size: .78rem; white-space: nowrap; }
td.number { white-space: nowrap; }
td.path, td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 9rem; }
.best { font-weight: 700; }
.best::after { content: " (best)"; position: absolute; left: -999rem; }
.cells tbody tr:first-child th { text-align: left; padding-top: 1.1rem; background: var(--shade); }
.cells tbody:target, tr:target { background: var(--mark); }
.missing, .failed { color: var(--bad); }
figure { margin: 0 0 2.5rem; }
figure h3 { margin-bottom: .25rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 60rem; }
.absent { color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); padding: .75rem; font-size: .82rem; }
footer { color: var(--soft); font-size: .88rem; padding-bottom: 2rem; }
@media (max-width: 40rem) { body { font-size: 15px; } dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; }
  main, header, footer { padding-left: .8rem; padding-right: .8rem; } th, td { padding: .3rem .45rem; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --shade: #f3f4f6; --link: #000;
  --mark: #fff; --bad: #000; }
  nav, .skip { display: none; } .wide { overflow: visible; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } thead { display: table-header-group; } figure svg { min-width: 0 !important; }
  body { font-size: 10pt; } table { font-size: 8pt; } a { text-decoration: none; } th, td { padding: .2rem .4rem; } }
"""

PAGE = """\
{%- macro sheet(table, id) %}
<section aria-labelledby="{{ id }}">
<h3 id="{{ id }}">{{ table.title }}</h3>
<div class="wide" tabindex="0" role="region" aria-labelledby="{{ id }}"><table>
<caption>{{ table.caption }}</caption>
<thead><tr>{% for name in table.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for name, entries in table.rows %}
<tr><th scope="row">{{ name }}</th>
{%- for entry in entries %}<td class="number"{% if entry.note %} title="{{ entry.note }}"{% endif %}>
{%- if entry.anchor %}<a href="#{{ entry.anchor }}"{% if entry.best %} class="best"{% endif %}>{{ entry.text }}</a>
{%- else %}{{ entry.text }}{% endif %}
{%- if entry.small %}<small>{{ entry.small }}</small>{% endif %}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
</section>
{%- endmacro %}
{%- macro drawing(one) %}
<figure id="{{ one.name }}"><h3 id="{{ one.name }}-title">{{ one.title }}</h3>
{%- if one.figure %}<div class="wide" tabindex="0" role="region" aria-labelledby="{{ one.name }}-title">
{{ svg(one) }}</div><figcaption id="{{ one.name }}-caption">{{ one.caption }}</figcaption>
{%- else %}<p class="absent">Not drawn. {{ one.caption }}</p>{% endif %}</figure>
{%- endmacro %}
{%- macro cells(part, id) %}
<div class="wide" tabindex="0" role="region" aria-labelledby="{{ id }}"><table class="cells">
<caption>A block per number of the tables above; the last column opens the cell's result.json.</caption>
<thead><tr>{% for name in cell_header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{%- for group in part.groups %}
<tbody id="{{ group.anchor }}"><tr><th scope="rowgroup" colspan="{{ cell_header | length }}">
{{- group.title }}: {{ group.number }}
{%- for anchor, title in group.parts %}{{ " of " if loop.first else ", " }}<a href="#{{ anchor }}">{{ title }}</a>
{%- endfor %}</th></tr>
{%- for cell in group.cells %}
<tr>{% for text in cell_row(cell) %}{% if loop.first %}<th scope="row">{{ text }}</th>{% elif loop.index == 9 -%}
<td class="path">{{ text }}</td>{% else %}<td class="number">{{ text }}</td>{% endif %}{% endfor %}<td class="number">
{%- if cell.done %}<a href="{{ link(cell.path) }}">result.json</a>
{%- else %}<strong class="{{ cell.state }}">{{ cell.state }}</strong>{% endif %}</td></tr>
{%- endfor %}</tbody>
{%- endfor %}
</table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<a class="skip" href="#scores">Skip to the scores</a>
<header>
<h1>{{ title }}</h1>
<dl>{% for name, lines in content.facts %}<dt>{{ name }}</dt><dd>{% for line in lines %}{{ line }}
{%- if not loop.last %}<br>{% endif %}{% endfor %}</dd>{% endfor %}</dl>
<nav aria-label="Contents"><ul><li><a href="#scores">Scores</a></li><li><a href="#figures">Figures</a></li>
<li><a href="#details">Details</a></li><li><a href="#cells">Cells</a></li>
{%- if content.unfinished %}<li><a href="#unfinished">Missing and failed</a></li>{% endif %}
{%- if content.left_out %}<li><a href="#left-out">Left out</a></li>{% endif %}</ul></nav>
</header>
<main>
<section aria-labelledby="scores"><h2 id="scores">Scores</h2>
{%- for part in content.parts %}{% if content.parts | length > 1 %}<h3>Model {{ part.model }}</h3>{% endif %}
{%- set outer = loop.index %}
{%- for table in part.sheets %}{{ sheet(table, "table-%d-%d" % (outer, loop.index)) }}{% endfor %}{% endfor %}
{%- if not content.parts %}<p class="absent">No cell has been fine-tuned yet.</p>{% endif %}
{%- if content.cautions %}<h3>To be read with care</h3><ul>
{%- for sentence in content.cautions %}<li>{{ sentence }}</li>{% endfor %}</ul>{% endif %}
</section>
<section aria-labelledby="figures"><h2 id="figures">Figures</h2>
{%- for part in content.parts %}{% if content.parts | length > 1 %}<h3>Model {{ part.model }}</h3>{% endif %}
{%- for one in part.drawings %}{{ drawing(one) }}{% endfor %}{% endfor %}
</section>
<section aria-labelledby="details"><h2 id="details">Details</h2>
{%- for part in content.parts %}{% if content.parts | length > 1 %}<h3>Model {{ part.model }}</h3>{% endif %}
{%- set outer = loop.index %}
{%- for table in part.details %}{{ sheet(table, "details-%d-%d" % (outer, loop.index)) }}{% endfor %}{% endfor %}
</section>
<section aria-labelledby="cells"><h2 id="cells">Cells</h2>
{%- for part in content.parts %}{% if content.parts | length > 1 %}<h3>Model {{ part.model }}</h3>{% endif %}
{{ cells(part, "cells") }}{% endfor %}
</section>
{%- if content.unfinished %}
<section aria-labelledby="unfinished"><h2 id="unfinished">Missing and failed</h2>
<div class="wide" tabindex="0" role="region" aria-labelledby="unfinished"><table>
<caption>Cells that are planned and have no result; dispatching the plan again runs them.</caption>
<thead><tr><th scope="col">cell</th><th scope="col">state</th><th scope="col">method</th><th scope="col">task</th>
<th scope="col">seed</th><th scope="col" class="text">why</th></tr></thead><tbody>
{%- for cell in content.unfinished %}
<tr><th scope="row">{{ cell.id }}</th><td><strong class="{{ cell.state }}">{{ cell.state }}</strong></td>
<td>{{ cell.method }}</td><td>{{ task(cell.task, cell.num_samples) }}</td><td>{{ cell.seed }}</td>
<td class="text">{% if cell.error %}<details><summary>{{ last_line(cell.error) }}</summary><pre>{{ cell.error }}</pre>
</details>{% endif %}</td></tr>
{%- endfor %}</tbody></table></div>
</section>
{%- endif %}
{%- if content.left_out %}
<section aria-labelledby="left-out"><h2 id="left-out">Left out</h2>
<ul>{% for sentence in content.left_out %}<li>{{ sentence }}</li>{% endfor %}</ul></section>
{%- endif %}
</main>
<footer><p>Written by <code>finemask report</code>. The same in <a href="report.md">Markdown</a>, as
<a href="cells.csv">cells.csv</a> and <a href="scores.csv">scores.csv</a>; the figures as files in
<code>figures/</code>. † marks a mean with an undefined score, which counts 0.</p></footer>
</body>
</html>
"""
