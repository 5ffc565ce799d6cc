// Show the fields that filter the rows of a table: they are hidden where scripts do not run.
for (const field of document.querySelectorAll(".filter input")) {
  const rows = field.parentElement.nextElementSibling.querySelectorAll("tbody tr");
  field.hidden = false;
  field.addEventListener("input", () => {
    const query = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(query);
  });
}
