//! Renders a run for the terminal, `docs/benchmarks.md` and README.
//!
//! All numbers are figures of the run or ratios of two of them.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::charts;
use crate::figures::{Figure, Run};
use crate::format::{distinct, number, ratio, size};
use crate::goals::{Bound, Goal, goals};
use crate::lane::{OURS, OURS_PREFIX, RAW_EVENT};
use crate::subjects::{self, group, latency};

const TEMPLATE: &str = "\
# Benchmarks

One program, `benches/compare`, runs this crate, the raw runtime API, cudarc and PyTorch on one machine, round by round
in turn. Host-side figures move with the machine: compare within one run. `benchmarks.json` beside this file holds each
figure with its 10th and 90th percentile; what stands between the marks below is rendered from it.

```sh
cargo bench -p cpu-gpu-buffer-bench -- --torch python3 --json run.json
cargo bench -p cpu-gpu-buffer-bench -- report run.json
```

<!-- figures -->
<!-- /figures -->
";

/// Renders the files into `out`. With `check` it only compares them.
pub fn report(files: &[PathBuf], out: &Path, check: bool) -> Result<(), String> {
    let own = [out.join("benchmarks.json")];
    if files.is_empty() && check && !own[0].exists() {
        println!("{}: there are no figures yet, nothing to check", own[0].display());
        return Ok(());
    }
    let files = if files.is_empty() { &own } else { files };
    let mut run = Run::default();
    for (at, file) in files.iter().enumerate() {
        let one: Run = serde_json::from_str(&read(file)?)
            .map_err(|error| format!("{}: {error}", file.display()))?;
        if at == 0 { run = one } else { run.merge(one) }
    }
    let mut rendered = vec![(own[0].clone(), json(&run))];
    let page = out.join("benchmarks.md");
    let before = if page.exists() { read(&page)? } else { TEMPLATE.into() };
    let charts = charts::all(&run);
    let link = |chart: &charts::Chart| format!("![{}](charts/{})\n\n", chart.title, chart.file);
    let links: String = charts.iter().map(link).collect();
    let figures = format!("\n{}\n{links}{}", summary(&run), details(&run));
    rendered.push((page.clone(), replaced(&page, &before, "figures", &figures)?));
    for chart in charts {
        rendered.push((out.join("charts").join(chart.file), chart.svg));
    }
    // The README next to the folder, if it exists.
    let readme = out.parent().unwrap_or(Path::new("")).join("README.md");
    if readme.exists() {
        let quoted = replaced(&readme, &read(&readme)?, "benchmarks", &quoted(&run))?;
        rendered.push((readme, quoted));
    }
    if !check {
        return rendered.iter().try_for_each(|(path, content)| write(path, content));
    }
    let differs = |(path, content): &&(PathBuf, String)| {
        fs::read_to_string(path).ok().as_ref() != Some(content)
    };
    let different: Vec<_> =
        rendered.iter().filter(differs).map(|(path, _)| path.display().to_string()).collect();
    if !different.is_empty() {
        return Err(format!("not what the figures give: {}", different.join(", ")));
    }
    println!("{} files are what the figures give", rendered.len());
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

pub fn write(path: &Path, content: &str) -> Result<(), String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(path, content))
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// A file with one figure a line.
pub fn json(run: &Run) -> String {
    let facts = |facts| serde_json::to_string_pretty(facts).expect("strings").replace('\n', "\n ");
    let lines = |lines: Vec<String>| match lines.is_empty() {
        true => "[]".to_string(),
        false => format!("[\n  {}\n ]", lines.join(",\n  ")),
    };
    let figure = |figure| serde_json::to_string::<Figure>(figure).expect("numbers and strings");
    let text = |text| serde_json::to_string::<String>(text).expect("a string");
    format!(
        "{{\n \"machine\": {},\n \"versions\": {},\n \"method\": {},\n \"left_out\": {},\n \"figures\": {}\n}}\n",
        facts(&run.machine),
        facts(&run.versions),
        facts(&run.method),
        lines(run.left_out.iter().map(text).collect()),
        lines(run.figures.iter().map(figure).collect()),
    )
}

/// A text with something else between two marks.
fn replaced(path: &Path, text: &str, mark: &str, content: &str) -> Result<String, String> {
    let (open, close) = (format!("<!-- {mark} -->"), format!("<!-- /{mark} -->"));
    let parts = text.split_once(&open).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&close)?;
        Some(format!("{before}{open}\n{content}{close}{after}"))
    });
    parts.ok_or_else(|| format!("{}: there is no {open} with {close} behind it", path.display()))
}

/// The machine and the goals.
pub fn summary(run: &Run) -> String {
    format!("{}\n\n{}", sentence(run), goal_table(&goals(run), is_short(run)))
}

/// All tables.
pub fn details(run: &Run) -> String {
    let mut text = "The number in brackets is this crate's figure over that one: below 1 is better where the unit is a \
                    time, above 1 where it is GB/s.\n"
        .to_string();
    for (subject, _) in subjects::ALL {
        text += &tables(run, subject);
    }
    if !run.left_out.is_empty() {
        text += "\n### Left out\n\n";
        run.left_out.iter().for_each(|line| text += &format!("- {line}\n"));
    }
    let facts = [("Machine", &run.machine), ("Versions", &run.versions), ("Method", &run.method)];
    for (title, facts) in facts {
        write!(text, "\n### {title}\n\n| | |\n|---|---|\n").expect("it is memory");
        facts.iter().for_each(|(name, value)| text += &format!("| {name} | {value} |\n"));
    }
    text
}

/// True if the run has too few samples for conclusions.
fn is_short(run: &Run) -> bool {
    run.method.get("form").is_some_and(|form| form == "short")
}

/// The machine and the versions in one sentence.
fn sentence(run: &Run) -> String {
    let known = |facts: &std::collections::BTreeMap<String, String>, name: &str, before: &str| {
        facts.get(name).map_or(String::new(), |value| format!("{before}{value}"))
    };
    format!(
        "{}{}{}{}{}{}{}{}.",
        run.machine.get("gpu").or(run.machine.get("device")).map_or("?", String::as_str),
        known(&run.machine, "driver", ", driver "),
        known(&run.versions, "CUDA runtime", ", CUDA "),
        known(&run.machine, "cores", ", cores: "),
        known(&run.versions, "cudarc", ", cudarc "),
        known(&run.versions, "PyTorch", ", PyTorch "),
        known(&run.method, "date", ", "),
        if is_short(run) { " (a short run, which measures next to nothing)" } else { "" },
    )
}

fn goal_table(goals: &[Goal], short: bool) -> String {
    let mut table =
        "| operation | compared with | goal | measured | |\n|---|---|---|---|---|\n".to_string();
    for goal in goals {
        let bound = match goal.bound {
            Bound::AtMost(bound) if bound < 0.1 => format!("at most {bound}"),
            Bound::AtMost(bound) => format!("at most {bound:.2}"),
            Bound::AtLeast(bound) => format!("at least {bound:.2}"),
            Bound::TimesFaster(bound) => format!("at least {bound:.0} times faster"),
        };
        let met = match goal.is_met() {
            Some(_) if short => "a short run",
            Some(true) => "met",
            Some(false) => "**not met**",
            None => "not measured",
        };
        let measured = goal.ratio.map_or(String::new(), ratio);
        table += &format!("| {} | {} | {bound} | {measured} | {met} |\n", goal.what, goal.against);
    }
    table
}

/// The lines that README quotes.
fn quoted(run: &Run) -> String {
    let of = |wanted: [(&str, &str); 3]| {
        let all = goals(run);
        let line = move |(what, against): (&str, &str)| {
            let goal = all.iter().find(|goal| goal.what == what).expect("it is one of them");
            let ratio = match (goal.ratio.map(ratio), goal.bound) {
                (None, _) => "not measured".into(),
                (Some(ratio), Bound::TimesFaster(_)) => format!("{ratio} times faster"),
                (Some(ratio), _) => ratio,
            };
            format!("| {what} | {against} | {ratio} |\n")
        };
        wanted.map(line).concat()
    };
    let lines = of([
        ("`copy_to_gpu` of 4 KB, enqueue", RAW_EVENT),
        ("`copy_to_cpu` of 4 KB and `cpu`, until it is read", latency::RAW_STREAM_WAIT),
        ("prefixes of 16 members of a group, 128 KB in all, enqueue", group::RAW_EACH),
    ]);
    format!("{}\n\n| operation | compared with | ratio |\n|---|---|---|\n{lines}", sentence(run))
}

/// The tables of a subject, one for each unit. Rows are cases and sizes, columns are contenders.
fn tables(run: &Run, subject: &str) -> String {
    let figures: Vec<_> = run.figures.iter().filter(|figure| figure.subject == subject).collect();
    let mut text = String::new();
    for unit in distinct(figures.iter().map(|figure| &figure.unit)) {
        let figures: Vec<_> = figures.iter().filter(|figure| figure.unit == *unit).collect();
        let by = distinct(figures.iter().map(|figure| figure.by.as_str()));
        write!(text, "\n### {subject}, {unit}\n\n| | ").expect("it is memory");
        by.iter().for_each(|by| text += &format!("| {by} "));
        text += &format!("|\n|---|---{}|\n", "|---:".repeat(by.len()));
        let mut last = "";
        for case in distinct(figures.iter().map(|figure| figure.case.as_str())) {
            let of_case = || figures.iter().filter(|figure| figure.case == case);
            let mut sizes = distinct(of_case().map(|figure| figure.at));
            sizes.sort_unstable();
            for at in sizes {
                let shown = if case == last { "" } else { case };
                last = case;
                text += &format!("| {shown} | {} ", at_text(subject, case, at));
                let line: Vec<_> = of_case().filter(|figure| figure.at == at).collect();
                for by in &by {
                    let figure = line.iter().find(|figure| figure.by == *by);
                    let cell = figure.map_or(String::new(), |figure| {
                        let over = ours(&line, by).map(|ours| ratio(ours / figure.median));
                        let over = over.map_or(String::new(), |over| format!(" ({over})"));
                        format!("{}{over}", number(figure.median))
                    });
                    text += &format!("| {cell} ");
                }
                text += "|\n";
            }
        }
    }
    text
}

/// This crate's figure that a contender's stands beside; none beside its own.
fn ours(line: &[&&&Figure], by: &str) -> Option<f64> {
    const OWN: [&str; 3] = [OURS, "BufferPool", "one BufferPool"];
    if OWN.iter().any(|own| by.starts_with(own)) {
        return None;
    }
    let prefix = by.contains("[:n]") || by.contains("(n)");
    let named = |name: &str| line.iter().find(|figure| figure.by == name);
    let figure = prefix.then(|| named(OURS_PREFIX)).flatten();
    let figure = figure
        .or_else(|| line.iter().find(|figure| OWN.iter().any(|own| figure.by.starts_with(own))));
    figure.map(|figure| figure.median)
}

fn at_text(subject: &str, case: &str, at: usize) -> String {
    match (subject, case.contains("buffers")) {
        ("pool", true) => format!("{at} buffers"),
        ("pool" | "threads", _) => format!("{at} thread{}", if at == 1 { "" } else { "s" }),
        _ => size(at),
    }
}
