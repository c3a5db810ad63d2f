"""The looks of the page, light and dark, and the script that shows numbers under the pointer. Both go inline."""

from __future__ import annotations

__all__ = ["POLICY", "SCRIPT", "STYLE"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'"
"""Content security policy: nothing is fetched, whatever a completion says."""

_LIGHT = """
color-scheme: light; --page: #f6f7f9; --card: #ffffff; --ink: #1a212b; --soft: #5c6878; --line: #e3e7ec;
  --grid: #edf0f3;
--c0: #0a6ebd; --c1: #d1600a; --c2: #2e8b57; --c3: #b0226f; --c4: #6a45b5; --c5: #a67c00; --c6: #0e8f9c;
  --c7: #7a6a5a;
--good: #18794e; --good-back: #dff3e8; --bad: #b4232a; --bad-back: #fbe5e5; --warn: #8a5a00; --warn-back: #fff3d6;
--heat: 10, 94, 168; --token: 214, 84, 20; --shadow: 0 1px 2px rgba(20, 30, 45, .06);
"""
_DARK = """
color-scheme: dark; --page: #10141a; --card: #181e26; --ink: #e4e9f0; --soft: #97a3b3; --line: #2a323d;
  --grid: #232b35;
--c0: #56aef2; --c1: #f59446; --c2: #5cc98c; --c3: #ee78b4; --c4: #ab92f3; --c5: #dcb53f; --c6: #45cbd6;
  --c7: #b9a893;
--good: #6fd6a2; --good-back: #153527; --bad: #ff8f8f; --bad-back: #421d20; --warn: #f3c969; --warn-back: #3a2d10;
--heat: 92, 180, 250; --token: 255, 140, 70; --shadow: none;
"""

_COLORS = "".join(f".s{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} " for i in range(8))
_KEYS = "".join(f".k{i} {{ background: var(--c{i}); }} " for i in range(8))
_HEAT = "".join(
    f"path.h{i} {{ fill: {shade}; }} i.h{i} {{ background: {shade}; }} "
    for i in range(1, 10)
    for shade in (f"rgba(var(--heat), {0.08 + 0.92 * (i / 9) ** 1.2:.2f})",)
)
_TOKENS = "".join(
    f".p{i} {{ background: rgba(var(--token), {a}); }} " for i, a in enumerate((0, 0.12, 0.24, 0.38, 0.54, 0.72))
)
_SHOWN = "".join(
    f"#show-{name}:checked ~ .list .r:not(.{name}) {{ display: none; }} "
    for name in ("right", "wrong", "unscored", "replayed")
)

STYLE = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
{_COLORS}
{_KEYS}
{_HEAT}
{_TOKENS}
{_SHOWN}
* {{ box-sizing: border-box; }}
html {{ scroll-behavior: smooth; scroll-padding-top: 56px; }}
@media (prefers-reduced-motion: reduce) {{ html {{ scroll-behavior: auto; }} }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 0 20px 72px; }}
header {{ padding: 34px 0 6px; }}
h1 {{ margin: 0; font-size: 28px; line-height: 1.25; letter-spacing: -.015em; overflow-wrap: anywhere; }}
h2 {{ margin: 46px 0 4px; font-size: 20px; letter-spacing: -.01em; }}
h3 {{ margin: 0; font-size: 14.5px; font-weight: 650; overflow-wrap: anywhere; }}
p {{ margin: 4px 0; max-width: 78ch; }}
.lead, .none, .sub, figcaption, .scale {{ color: var(--soft); font-size: 13.5px; }}
.state {{ display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-top: 8px;
  color: var(--soft); font-size: 14px; }}
.badge {{ display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12.5px; font-weight: 600;
  background: var(--line); color: var(--ink); white-space: nowrap; }}
.badge.right, .badge.finished {{ background: var(--good-back); color: var(--good); }}
.badge.wrong {{ background: var(--bad-back); color: var(--bad); }}
.badge.running, .badge.unscored {{ background: var(--warn-back); color: var(--warn); }}
nav {{ position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  margin: 12px -20px 0; padding: 0 20px; overflow-x: auto; white-space: nowrap; scrollbar-width: none; }}
nav a {{ display: inline-block; padding: 10px 12px 10px 0; margin-right: 8px; color: var(--soft);
  text-decoration: none; font-size: 14px; }}
nav a:hover {{ color: var(--c0); }}
:focus-visible {{ outline: 2px solid var(--c0); outline-offset: 2px; border-radius: 4px; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  margin: 0; box-shadow: var(--shadow); min-width: 0; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 186px), 1fr)); gap: 12px;
  margin: 20px 0 12px; }}
.tile {{ display: flex; flex-direction: column; padding: 13px 16px 12px; }}
.tile .name {{ color: var(--soft); font-size: 13px; }}
.tile b {{ font-size: 19px; line-height: 1.5; font-weight: 650; white-space: nowrap; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }}
.tile .sub {{ font-size: 12.5px; margin-top: auto; }}
.up {{ color: var(--good); }} .down {{ color: var(--bad); }}
.spark {{ height: 24px; width: 100%; margin-top: 4px; opacity: .85; }}
.notes {{ list-style: none; margin: 0 0 12px; padding: 10px 16px; border-radius: 12px;
  background: var(--warn-back); color: var(--warn); font-size: 14px; }}
.grid {{ display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 14px; margin-top: 14px; }}
.grid > figure {{ grid-column: span 3; }} .grid > figure.third {{ grid-column: span 2; }}
@media (max-width: 980px) {{ .grid > figure.third {{ grid-column: span 3; }} }}
@media (max-width: 700px) {{ .grid > figure, .grid > figure.third {{ grid-column: 1 / -1; }}
  main {{ padding: 0 12px 48px; }}
  nav {{ margin: 12px -12px 0; padding: 0 12px; }} .card {{ padding: 13px 13px; }} .wide .t {{ font-size: 14px; }}
  .tiles {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }} .tile b {{ font-size: 17px; }}
  h1 {{ font-size: 23px; }} }}
figure {{ display: flex; flex-direction: column; }}
figcaption {{ margin-top: 8px; font-size: 13px; line-height: 1.45; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 5px 0 2px; font-size: 12.5px;
  color: var(--soft); }}
.legend i, .key {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }}
svg.chart {{ display: block; overflow: visible; width: 100%; height: auto; margin-top: 6px; touch-action: pan-y; }}
svg text {{ font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }}
.m {{ text-anchor: middle; }} .e {{ text-anchor: end; }}
path {{ fill: none; }} .grid path.grid, path.grid {{ stroke: var(--grid); }} path.axis {{ stroke: var(--line); }}
.thick {{ stroke-width: 2.6; }} .plain {{ stroke-width: 1.9; }} .thin {{ stroke-width: 1.3; opacity: .75; }}
  .raw {{ stroke-width: 1; opacity: .3; }}
.dashed {{ stroke-width: 1.3; stroke-dasharray: 4 4; }} .muted {{ stroke: var(--soft); opacity: .7; }}
path.thick, path.plain, path.thin, path.raw {{ stroke-linejoin: round; stroke-linecap: round; }}
{"".join(f"path.band.f{i}, path.layer.f{i} {{ fill: var(--c{i}); }} " for i in range(8))}
.band {{ opacity: .16; }} .layer {{ opacity: .9; }} rect.layer {{ opacity: .35; }} .bubble {{ opacity: .85;
  stroke: var(--card); }}
path[class^="h"] {{ shape-rendering: crispEdges; }}
.cross {{ stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; pointer-events: none; }}
#tip {{ position: fixed; z-index: 3; pointer-events: none; display: none; max-width: 320px; padding: 7px 11px;
  border-radius: 8px; font-size: 12.5px;
  line-height: 1.5; background: var(--card); color: var(--ink); border: 1px solid var(--line);
  box-shadow: 0 4px 16px rgba(0, 0, 0, .2); font-variant-numeric: tabular-nums; }}
#tip i {{ display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }}
summary {{ cursor: pointer; }} details.data {{ margin-top: auto; padding-top: 6px; font-size: 12.5px;
  color: var(--soft); }}
details.data > div, .scroll {{ overflow-x: auto; max-height: 420px; overflow-y: auto; }}
  .scroll.tall {{ max-height: none; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
td, th {{ padding: 5px 14px 5px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
th[scope=row] {{ min-width: 8em; overflow-wrap: normal; }} td {{ min-width: 5em; }}
table:has(td + td) td {{ overflow-wrap: break-word; }}
.legend i[class^=h] {{ margin: 0; border-radius: 0; }} .cards {{ display: grid; gap: 14px; }}
td + td, th + th {{ min-width: 60px; }} tr {{ border-bottom: 1px solid var(--line); }} th {{ color: var(--soft);
  font-weight: 500; }}
td.n, th.n {{ text-align: right; }} tr:last-child {{ border-bottom: 0; }}
pre {{ margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }}
pre.prompt {{ color: var(--soft); border-left: 3px solid var(--line); padding-left: 10px; line-height: 1.5; }}
pre span, .scale span {{ border-radius: 3px; padding: 1px 0; box-shadow: inset 0 0 0 .5px var(--line); }}
  .scale span {{ padding: 1px 7px; margin-right: 3px; color: var(--ink); display: inline-block; }}
pre span:hover {{ outline: 1.5px solid var(--c0); }} .code {{ font-size: 10px; font-style: normal;
  color: var(--bad); border: 1px solid; border-radius: 3px; padding: 0 2px; }}
.rollouts {{ margin-top: 12px; }} .rollouts > input {{ position: absolute; opacity: 0; }}
.rollouts > label {{ display: inline-block; padding: 3px 13px; margin: 0 6px 6px 0;
  border: 1px solid var(--line); border-radius: 99px; font-size: 13.5px; cursor: pointer;
  background: var(--card); }}
.rollouts > input:checked + label {{ background: var(--c0); border-color: var(--c0); color: var(--card); }}
.rollouts > input:focus-visible + label {{ outline: 2px solid var(--c0); outline-offset: 2px; }}
.list {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 10px;
  align-items: start; margin-top: 10px; }}
.r {{ padding: 11px 14px; }} .r summary {{ display: flex; gap: 10px; align-items: baseline; flex-wrap: wrap; }}
.facts {{ color: var(--soft); font-size: 12.5px; }} .short {{ font: 12.5px ui-monospace, monospace;
  color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 100%; }}
.r[open] .short {{ display: none; }} .changed {{ color: var(--c1); font-weight: 600; }}
  footer {{ margin-top: 48px; color: var(--soft); font-size: 12.5px; }}
@media print {{ nav, #tip, .rollouts > input, .rollouts > label {{ display: none !important; }}
  figure, .r {{ break-inside: avoid; }} }}
"""

SCRIPT = """
(function () {
  const tip = document.getElementById('tip');
  function row(color, text) {
    const line = document.createElement('div');
    if (color !== null) { const key = document.createElement('i'); key.className = 'k' + color; line.append(key); }
    line.append(text); tip.append(line);
  }
  function nearest(points, x, at) {
    let best = 0;
    for (let i = 1; i < points.length;
  i++) if (Math.abs(at(points[i]) - x) < Math.abs(at(points[best]) - x)) best = i;
    return best;
  }
  for (const chart of document.querySelectorAll('svg.chart')) {
    const data = JSON.parse(chart.dataset.hover), cross = chart.querySelector('.cross'), size =
  chart.viewBox.baseVal;
    function hide() { tip.style.display = 'none'; cross.setAttribute('d', ''); }
    function show(event) {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * size.width, y = (event.clientY - box.top) / box.height *
  size.height;
      tip.replaceChildren();
      let where;
      if (data.g) {
        const i = nearest(data.g.x, x, p => p[0]), j = nearest(data.g.y, y, p => p[0]);
        where = data.g.x[i][0];
        row(null, data.x + ' ' + data.g.x[i][1]);
        row(null, data.g.y[j][1] + ': ' + (100 * data.g.v[i][j]).toFixed(1) + '%');
      } else {
        const all = data.s.flatMap(s => s.p);
        if (!all.length) return;
        const near = all[nearest(all, x, p => p[0])];
        where = near[0];
        row(null, data.x + ' ' + near[2]);
        for (const s of data.s) {
          const p = s.p.length ? s.p[nearest(s.p, where, p => p[0])] : null;
          if (p && Math.abs(p[0] - where) < 3) row(s.c, s.n + ': ' + p[3]);
        }
      }
      cross.setAttribute('d', 'M' + where + ' 8V' + (size.height - 40));
      tip.style.display = 'block';
      const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
      tip.style.left = Math.max(4, right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14) + 'px';
      tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)) + 'px';
    }
    chart.addEventListener('pointermove', show);
    chart.addEventListener('pointerdown', show);
    chart.addEventListener('pointerleave', hide);
  }
})();
"""
