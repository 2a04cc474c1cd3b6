// Sorts the tables marked for it by a column; without scripts they stand in the page's own order.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => (row.cells[column].firstChild?.textContent ?? "").trim();
  const number = (text) => {
    const match = /^[+\-−]?[\d,]*\.?\d+/.exec(text);
    if (!match) return NaN;
    const unit = { k: 1e3, M: 1e6, B: 1e9 }[text.trim().slice(-1)] ?? 1;
    return Number(match[0].replace("−", "-").replaceAll(",", "")) * unit;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sorter";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => {
        const text = value(row, column);
        return { row, text, number: head.className === "n" ? number(text) : NaN };
      });
      const numeric = head.className === "n";
      keyed.sort((a, b) => {
        if (!numeric) return (falling ? -1 : 1) * a.text.localeCompare(b.text);
        if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);
        return (falling ? -1 : 1) * (a.number - b.number);
      });
      for (const { row } of keyed) body.append(row);
    });
  });
}
// The table of contents marks the section that is read.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver(
  (seen) => {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      for (const [id, link] of links) {
        if (id !== target.id) link.removeAttribute("aria-current");
      }
      const link = links.get(target.id);
      link.setAttribute("aria-current", "true");
      link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 40;
    }
  },
  { rootMargin: "-15% 0px -80% 0px" },
);
for (const id of links.keys()) watch.observe(document.getElementById(id));
