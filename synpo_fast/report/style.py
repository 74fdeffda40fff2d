"""The CSS of a report, and its script, which shows a chart's values at the pointer. Neither loads anything."""

from synpo_fast.report.colours import THEMES

STYLE = (
    THEMES
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",
sans-serif;overflow-wrap:anywhere}
main,header{max-width:1220px;margin:0 auto;padding:0 20px}
header{padding-top:24px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px}
h2{font-size:19px;margin:36px 0 10px}
h3{font-size:14.5px;line-height:1.35;margin:0}
p{margin:0 0 8px}
.soft,.note{color:var(--soft)}
.note{font-size:12.5px;margin:0}
.note+.charts{margin-top:8px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0 0;font-size:14px}
a{color:var(--c0)}
.card,.chart,.tile{background:var(--card);border:1px solid var(--faint);border-radius:10px}
.card{padding:14px 16px;margin:0 0 14px}
.problems{border-color:var(--warn);background:var(--warn-bg);margin-top:16px}
.problems ul{margin:6px 0 0;padding-left:20px}
.problems b{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:10px;margin:0 0 14px}
.tile{padding:10px 12px}
.tile b{display:block;font-size:20px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{font-size:12.5px;color:var(--soft);line-height:1.3;display:block}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
.chart{margin:0;padding:12px 12px 6px;display:flex;flex-direction:column;justify-content:space-between;min-width:0}
.chart figcaption{min-height:44px}
.plot{position:relative}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg path{fill:none;stroke-linejoin:round;stroke-linecap:round}
svg .grid{stroke:var(--grid);stroke-width:.7;stroke-dasharray:.7 3.3;stroke-linecap:butt}
.axis,.rule{stroke:var(--soft)}.rule{stroke-dasharray:2 3}
.raw{stroke:var(--c);stroke-width:.7;opacity:var(--thin)}
.line{stroke:var(--c);stroke-width:2.2}
.line.dashed{stroke-dasharray:5 4;stroke-width:1.7}
.lost{stroke:var(--warn);stroke-width:1.5}
.runs~section .lost{stroke:var(--c)}
.dot{fill:var(--c)}
.mark{fill:var(--card);stroke:var(--c);stroke-width:1.6}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;margin:2px 0 0;font-size:12.5px;color:var(--soft)}
.key i,.runs i{display:inline-block;width:20px;height:0;vertical-align:middle;margin-right:6px}
.readout{position:absolute;top:2px;right:6px;max-width:75%;background:var(--card);border:1px solid var(--faint);
border-radius:6px;padding:2px 7px;font-size:12px;font-variant-numeric:tabular-nums;pointer-events:none}
.readout[hidden]{display:none}
.readout div{display:flex;gap:6px;justify-content:space-between}
.runs{position:sticky;top:0;z-index:2;background:var(--page);display:flex;
flex-wrap:wrap;gap:2px 18px;padding:8px 0;font-size:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;width:100%}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--faint)}
tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;font-size:12.5px}
tbody th{font-weight:500}
th{overflow-wrap:break-word}
.free th{overflow-wrap:anywhere;min-width:84px}
.numbers td,.numbers thead th+th{text-align:right;font-variant-numeric:tabular-nums}
.numbers td{white-space:nowrap}
.numbers td:last-child,.numbers th:last-child{padding-right:0}
.several td,.several th{min-width:92px}
.several thead th{overflow-wrap:anywhere}
.unit{display:block;color:var(--soft);font-size:11.5px;font-weight:400;white-space:normal}
details{margin:8px 0}
summary{cursor:pointer;color:var(--soft);font-size:14px}
pre{white-space:pre-wrap;font:12.5px/1.5 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;margin:8px 0 0}
code{font:12.5px ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
.video{display:grid;grid-template-columns:minmax(0,340px) minmax(0,1fr);gap:18px}
.frames{display:grid;grid-template-columns:1fr 1fr;gap:6px;align-content:start}
.frames img{width:100%;height:auto;display:block;border-radius:5px;background:var(--faint)}
.frames p{grid-column:1/-1}
.said{margin:8px 0 0;display:grid;grid-template-columns:minmax(84px,max-content) minmax(0,1fr);gap:6px 14px;font-size:14px}
.said dt{color:var(--soft);font-size:12.5px;padding-top:1px;max-width:150px}
.said dd{margin:0;white-space:pre-wrap}
.said .barred{border-left:3px solid;padding-left:8px}
.pair+.pair{border-top:1px solid var(--faint);margin-top:14px;padding-top:12px}
.bars{display:grid;grid-template-columns:minmax(70px,max-content) minmax(0,1fr);gap:6px 12px;align-items:center;font-size:13.5px}
.bar{display:flex;height:22px;border-radius:4px;overflow:hidden}
.bar span{display:block;height:100%}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
footer{max-width:1220px;margin:0 auto;padding:26px 20px 40px;color:var(--soft);font-size:13px}
@media(max-width:760px){
main,header,footer{padding-left:14px;padding-right:14px}
.video{grid-template-columns:minmax(0,1fr)}
.frames{grid-template-columns:repeat(4,minmax(0,1fr));gap:4px}
.tiles{grid-template-columns:1fr 1fr}
.said{grid-template-columns:minmax(0,1fr);gap:2px}
.said dd{margin-bottom:6px}
.said dt{max-width:none}
.several td,.several th{min-width:62px}
.several:not(.numbers) td{min-width:120px}
.stack tr{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));border-bottom:1px solid var(--faint);
padding:4px 0}
.stack tr:last-child{border-bottom:0}
.stack tr>*{border:0;padding:0 8px 2px 0;min-width:0;font-size:12.5px}
.stack tr>:first-child{grid-column:1/-1;padding-bottom:0}
.stack th .unit{display:inline;margin-left:6px}
.bars{grid-template-columns:minmax(0,1fr);gap:2px}
.bar{margin-bottom:6px}
.chart figcaption{min-height:0;margin-bottom:4px}
.rows thead{display:none}
.rows tr{display:block;padding:5px 0;border-bottom:1px solid var(--faint)}
.rows tr:last-child{border-bottom:0}
.rows th,.rows td{display:block;border:0;padding:0}
.rows td{color:var(--soft)}
}
@media print{.runs{position:static}.card,.chart,.tile{break-inside:avoid}}
"""
)

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const note = svg.parentNode.querySelector(".readout"), rule = svg.querySelector(".rule");
  const [first, last, left, right] = svg.dataset.x.split(" ").map(Number);
  const [low, high, bottom, top] = svg.dataset.y.split(" ").map(Number);
  let lines = null;
  const read = () => [...svg.querySelectorAll("path[data-name]")].map(path => ({
    name: path.dataset.name, colour: path.style.getPropertyValue("--c"),
    at: [...path.getAttribute("d").matchAll(/[ML](-?[0-9.]+) (-?[0-9.]+)/g)].map(m => [+m[1], +m[2]])})).filter(l => l.at.length);
  const hide = () => { note.hidden = true; rule.setAttribute("d", ""); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    lines = lines || read();
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    if (!lines.length || x < left - 4 || x > right + 4) return hide();
    note.replaceChildren();
    const add = (text, value, colour) => {
      const row = document.createElement("div"), name = document.createElement("span"), number = document.createElement("b");
      name.textContent = text; number.textContent = value; name.style.color = colour;
      row.append(name, number); note.append(row);
    };
    const nearest = line => line.at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const near = nearest(lines[0])[0];
    add("step", Math.round(first + (near - left) / (right - left) * (last - first)).toLocaleString("en"), "");
    for (const line of lines) {
      const value = low + (bottom - nearest(line)[1]) / (bottom - top) * (high - low);
      const size = Math.abs(value), long = size >= 1e6 || (size > 0 && size < 1e-3);
      const text = long ? value.toExponential(2) : Number(value.toPrecision(3)).toLocaleString("en");
      add(line.name, text + (svg.dataset.unit ? " " + svg.dataset.unit : ""), line.colour);
    }
    rule.setAttribute("d", `M${near} ${top}V${bottom}`);
    note.hidden = false;
    note.style.right = x > (left + right) / 2 ? "auto" : "6px";
    note.style.left = x > (left + right) / 2 ? left / svg.viewBox.baseVal.width * 100 + "%" : "auto";
  });
}
"""
