// Columns sort by a click on their heading, and a link to a scheme opens its fold. The page is whole without this.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const head of table.tHead.rows[0].cells) {
    if (!head.textContent) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const key = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent;
      // what is not a number is last either way
      const last = (text) => Number(text === "nan" || text === "inf");
      const order = (a, b) => last(a) - last(b) || sign * a.localeCompare(b, "en", { numeric: true });
      const sorted = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return isNaN(x) || isNaN(y) ? order(x, y) : sign * (x - y);
      });
      body.append(...sorted);
    });
  }
}
function unfold() {
  const found = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  const fold = found && found.closest("details");
  if (!fold) return;
  fold.open = true;
  found.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();
