// A click on the title of a column sorts by it; another click turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => title.querySelector("button").addEventListener("click", () => {
    const down = title.getAttribute("aria-sort") === "ascending";
    titles.forEach((other) => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const number = (text) => ({ inf: Infinity, "-inf": -Infinity }[text] ?? parseFloat(text));
    const compare = (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (!Number.isNaN(x) && !Number.isNaN(y)) return x === y ? 0 : x - y;
      return a.localeCompare(b, undefined, { numeric: true });
    };
    const rows = [...table.tBodies[0].rows];
    // What has no value comes last, either way.
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!x || !y) return !x - !y;
      return down ? compare(y, x) : compare(x, y);
    });
    table.tBodies[0].append(...rows);
  }));
}
