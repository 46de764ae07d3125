document.querySelectorAll("table.sortable th").forEach(function (th) {
  th.addEventListener("click", function () {
    var table = th.closest("table"), body = table.tBodies[0], column = th.cellIndex;
    var up = !th.classList.contains("up");
    table.querySelectorAll("th").forEach(function (other) { other.classList.remove("up", "down"); });
    th.classList.add(up ? "up" : "down");
    Array.from(body.rows).sort(function (a, b) {
      var x = a.cells[column].dataset.v, y = b.cells[column].dataset.v;
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      var p = Number(x), q = Number(y);
      var order = isNaN(p) || isNaN(q) ? (x < y ? -1 : x > y ? 1 : 0) : p - q;
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
