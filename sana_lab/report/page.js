for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => { const cell = row.cells[column], v = cell.dataset.value; return v === undefined ? cell.textContent : v };
    const order = (a, b) => { const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = !isNaN(x) && !isNaN(y), by = numbers ? x - y : x.localeCompare(y); return up ? by : -by };
    body.append(...[...body.rows].sort(order)) }));
}
for (const slider of document.querySelectorAll("div.slider")) {
  const range = slider.querySelector("input"), steps = JSON.parse(slider.dataset.steps);
  const show = () => { slider.querySelector("output").textContent = "step " + steps[range.value];
    slider.querySelectorAll("img").forEach(img => { img.hidden = img.dataset.step !== range.value }) };
  range.addEventListener("input", show); show();
}
for (const part of document.querySelectorAll("div.outcomes")) {
  const data = JSON.parse(part.querySelector("script").textContent), [first, second] = part.querySelectorAll("select");
  const only = part.querySelector("input"), body = part.querySelector("tbody"), count = part.querySelector("output");
  const cell = (row, i) => { const td = document.createElement("td"), share = data.rows[row].shares[i];
    const picture = data.rows[row].pictures[i];
    if (picture) { const img = new Image(); img.src = "data:image/webp;base64," + picture; img.loading = "lazy";
      img.alt = data.rows[row].label + ": " + data.prompts[i]; td.append(img) }
    td.append(share === null ? "\u2014" : share.toFixed(2)); td.title = data.rows[row].reasons[i] || ""; return td };
  const show = () => { body.replaceChildren(); const a = data.rows[first.value], b = data.rows[second.value]; let shown = 0;
    data.prompts.forEach((prompt, i) => { if (only.checked && a.shares[i] === b.shares[i]) return; shown += 1;
      const row = body.insertRow(); for (const text of [data.tasks[i], prompt]) { const td = row.insertCell();
        td.textContent = text; td.className = "prompt" }
      const [x, y] = [cell(first.value, i), cell(second.value, i)]; row.append(x, y);
      if (b.shares[i] !== a.shares[i]) y.className = b.shares[i] > a.shares[i] ? "good" : "bad" });
    part.querySelectorAll("th.row").forEach((th, k) => { th.textContent = [a, b][k].label });
    count.textContent = shown + " of " + data.prompts.length + " prompts" };
  for (const input of [first, second, only]) input.addEventListener("change", show); show();
}
