// The style sheet of the demonstration's page.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_HTML_STYLE_H_
#define FLASH_ENTMAX_TOOLS_DEMO_HTML_STYLE_H_

namespace flash_entmax::cli {

inline constexpr const char* kPageStyle = R"css(
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1f23; --soft: #5d6570; --rule: #d9dde2; --panel: #f6f7f9;
  --weight: 208 66 28; --same: #0b6b61;
  --series-0: #6a737f; --series-1: #d0421c; --series-2: #1766b3;
  --series-3: #2f8a3c; --series-4: #8a4fc0; --series-5: #a87900;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e8ea; --soft: #9aa3ad; --rule: #343a41; --panel: #1d2125;
    --weight: 240 104 64; --same: #62d0c2;
    --series-0: #a9b2bd; --series-1: #f27a55; --series-2: #68b0f5;
    --series-3: #6cc47a; --series-4: #bf93ea; --series-5: #dcb04a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .35rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.08rem; }
.note { color: var(--soft); font-size: .88rem; }
code, .excerpt { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font-size: .88em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; line-height: 1.3; color: var(--soft);
  vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.baseline td { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2rem; margin: 1rem 0; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .25rem; }
figcaption .note { font-weight: 400; }
svg.plot { display: block; width: 100%; height: auto; font-size: 13px; }
svg text { fill: var(--ink); }
svg text.tick { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg g[class^="series"] { fill: currentColor; }
.series-0 { color: var(--series-0); } .series-1 { color: var(--series-1); }
.series-2 { color: var(--series-2); } .series-3 { color: var(--series-3); }
.series-4 { color: var(--series-4); } .series-5 { color: var(--series-5); }
.map { margin: 1.25rem 0; }
.map img { display: block; width: 1024px; max-width: 100%; min-width: 40rem; height: auto;
  background: var(--paper); border: 1px solid var(--rule); }
.axis-names { display: flex; justify-content: space-between; width: 1024px; max-width: 100%;
  min-width: 40rem; color: var(--soft); font-size: .82rem; padding-top: .2rem; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .5rem;
  color: var(--soft); font-size: .85rem; }
.scale .bar { display: inline-flex; border: 1px solid var(--rule); background: var(--paper); }
.scale .bar i { width: 13px; height: 14px; }
.passage { border-top: 1px solid var(--rule); padding: 1rem 0 .75rem; }
.rows { display: grid; font-size: .82rem; }
.row { display: grid; grid-template-columns: 4.2rem 5.2rem minmax(0, 1fr); align-items: center;
  column-gap: .75rem; padding: .12rem 0; }
.row > span { text-align: right; font-variant-numeric: tabular-nums; }
.row.query { background: var(--panel); }
.row.head { color: var(--soft); font-size: .78rem; }
.row.zero { color: var(--soft); }
.row.zero .text { font-family: inherit; }
.excerpt { display: grid; grid-template-columns: minmax(0, 2.4fr) auto minmax(0, 1fr);
  white-space: pre; border-radius: 3px; padding: .1rem .3rem;
  background: rgb(var(--weight) / calc(var(--w, 0) * .6)); }
.before { overflow: hidden; display: flex; justify-content: flex-end; }
.after { overflow: hidden; color: var(--soft); }
.same { color: var(--same); font-weight: 600; }
mark { background: var(--ink); color: var(--paper); border-radius: 2px; padding: 0 .15em;
  margin: 0 .1em; }
pre { background: var(--panel); padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
@media (prefers-color-scheme: dark) {
  .map img, .scale .bar { filter: brightness(1.25); }
}
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  .row { grid-template-columns: 3rem 3.4rem minmax(0, 1fr); column-gap: .4rem; }
  .rows { font-size: .74rem; }
  th, td { padding: .3rem .5rem; }
}
)css";

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_HTML_STYLE_H_
