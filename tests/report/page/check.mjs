// node check.mjs PAGE.html ...: is a report valid, accessible, self-contained, and fit for a phone?
// Needs Chromium: CHROMIUM=/path/to/it, /usr/bin/chromium by default. `make page-check` installs the rest.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { HtmlValidate } from "html-validate";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf-8");
const validator = new HtmlValidate({
  extends: ["html-validate:recommended"],
  rules: {
    "no-inline-style": "off", // matplotlib styles its SVG so
    "no-trailing-whitespace": "off",
    "long-title": "off", // a study may be called anything
    "prefer-native-element": ["error", { exclude: ["region"] }], // a box that scrolls is no section
  },
});
const SCREENS = [
  [390, "light"],
  [390, "dark"],
  [1200, "light"],
  [1920, "light"],
  [1920, "dark"],
];

async function look(page, name, complain) {
  page.on("console", (message) => message.type() === "error" && complain(`console: ${message.text()}`));
  page.on("pageerror", (error) => complain(`script: ${error.message}`));
  page.on("request", (request) => {
    const url = request.url();
    if (url !== name && !url.startsWith("data:")) complain(`request: ${url}`);
  });
  await page.goto(name);
}

async function check(browser, file) {
  const name = pathToFileURL(resolve(file)).href;
  const problems = [];
  const found = await validator.validateFile(file);
  for (const { messages } of found.results)
    for (const m of messages) problems.push(`html ${m.line}:${m.column}: ${m.message} (${m.ruleId})`);

  for (const [width, colorScheme] of SCREENS) {
    const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme });
    const page = await context.newPage();
    const complain = (text) => problems.push(`${width} ${colorScheme}: ${text}`);
    await look(page, name, complain);
    await page.evaluate(() => document.querySelectorAll("details").forEach((d) => (d.open = true)));
    const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (over > 0) complain(`the page is ${over} px too wide`);
    if (width >= 1200)
      for (const label of await page.evaluate(() =>
        [...document.querySelectorAll(".scroll")]
          .filter((part) => part.scrollWidth > part.clientWidth)
          .map((part) => part.ariaLabel),
      ))
        complain(`table "${label}" scrolls sideways`);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run());
    for (const v of violations)
      complain(`axe ${v.impact}: ${v.id}, ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.target).join(" | ")}`);
    await context.close();
  }

  // without scripts nothing but the sorting is missing
  const texts = [];
  for (const javaScriptEnabled of [true, false]) {
    const context = await browser.newContext({ javaScriptEnabled });
    const page = await context.newPage();
    await page.goto(name);
    texts.push((await page.locator("main").textContent()).replace(/\s+/g, " "));
    await context.close();
  }
  if (texts[0] !== texts[1]) problems.push("without scripts the text is another one");

  const page = await browser.newPage();
  await page.goto(name);
  const sorted = await page.evaluate(() => {
    document.querySelectorAll("details").forEach((d) => (d.open = true));
    const wrong = [];
    for (const table of document.querySelectorAll("table[data-sortable]")) {
      const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "NDCG@10");
      if (column < 0) continue;
      table.tHead.rows[0].cells[column].querySelector("button").click();
      const values = [...table.tBodies[0].rows].map((r) => parseFloat(r.cells[column].firstChild.textContent));
      const numbers = values.filter((value) => !Number.isNaN(value));
      if (numbers.some((value, i) => i && value < numbers[i - 1])) wrong.push(table.parentElement.ariaLabel);
    }
    return wrong;
  });
  for (const label of sorted) problems.push(`table "${label}" does not sort`);
  await page.close();
  return problems;
}

const files = process.argv.slice(2);
if (!files.length) {
  console.error("node check.mjs PAGE.html ...");
  process.exit(2);
}
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
let bad = 0;
for (const file of files) {
  const problems = await check(browser, file);
  bad += problems.length;
  console.log(problems.length ? `${file}\n  ${[...new Set(problems)].join("\n  ")}` : `${file}: nothing found`);
}
await browser.close();
process.exit(bad ? 1 : 0);
