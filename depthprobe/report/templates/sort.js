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
