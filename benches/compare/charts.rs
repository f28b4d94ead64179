//! Renders the charts of a report as SVG.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::figures::{Figure, Run};
use crate::format::{distinct, number, size};
use crate::lane::{OURS, RAW};
use crate::subjects::pool;

pub struct Chart {
    pub file: &'static str,
    pub title: &'static str,
    pub svg: String,
}

/// All charts for which the run has figures.
pub fn all(run: &Run) -> Vec<Chart> {
    type Draw = fn(&Run) -> Option<String>;
    let charts: [(&str, &str, Draw); 3] = [
        ("bandwidth.svg", "Bandwidth of copies", bandwidth),
        ("enqueue.svg", "Cost of enqueueing a copy of 4 KB", enqueue),
        ("pool.svg", "Cost of an acquire and a release, each thread", pool_cost),
    ];
    let drawn = charts.into_iter().map(|(file, title, draw)| {
        let svg = draw(run)?;
        Some(Chart { file, title, svg })
    });
    drawn.flatten().collect()
}

/// Colours that people with any colour vision can distinguish (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const VERMILION: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const PURPLE: RGBColor = RGBColor(204, 121, 167);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const SKY: RGBColor = RGBColor(86, 180, 233);
const COLOURS: [RGBColor; 6] = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY];
const GREY: RGBColor = RGBColor(90, 90, 90);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn font(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK)
}

/// Draws into an SVG of a size.
fn drawn(width: u32, height: u32, draw: impl FnOnce(&Area<'_>)) -> String {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    done(area.fill(&WHITE));
    draw(&area);
    done(area.present());
    drop(area);
    svg
}

/// Drawing into memory does not fail.
fn done<V, E: std::fmt::Debug>(result: Result<V, E>) -> V {
    result.expect("drawing into memory")
}

fn write(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, anchor: HPos) {
    let style = font(size).pos(Pos::new(anchor, VPos::Center));
    done(area.draw(&Text::new(text.to_string(), at, style)));
}

/// The marker of a line, which identifies it without colours.
fn colour(line: usize) -> RGBColor {
    COLOURS[line % COLOURS.len()]
}

fn marker(area: &Area<'_>, line: usize, (x, y): (i32, i32)) {
    let fill = colour(line).filled();
    let stroke = colour(line).stroke_width(2);
    done(match line % 6 {
        0 => area.draw(&Circle::new((x, y), 5, fill)),
        1 => area.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], stroke)),
        2 => area.draw(&TriangleMarker::new((x, y), 6, fill)),
        3 => area.draw(&Cross::new((x, y), 4, stroke)),
        4 => area.draw(&Circle::new((x, y), 4, stroke)),
        _ => area.draw(&Rectangle::new([(x - 3, y - 3), (x + 3, y + 3)], fill)),
    });
}

/// A name without its Markdown.
fn plain(name: &str) -> String {
    name.replace('`', "")
}

/// The positions of the line names, in rows between the title and the data.
fn key(names: &[&str], width: i32) -> Vec<(i32, i32)> {
    let mut at = (20, 50);
    let place = |name: &&str| {
        // An estimate of the width in pixels.
        let length = 58 + 8 * plain(name).len() as i32;
        if at.0 > 20 && at.0 + length > width {
            at = (20, at.1 + 24);
        }
        let place = at;
        at.0 += length;
        place
    };
    names.iter().map(place).collect()
}

/// Lines over equidistant positions on the horizontal axis.
struct Panel<'a> {
    title: String,
    places: Vec<String>,
    /// The title of the horizontal axis.
    along: &'a str,
    unit: &'a str,
    /// The values of each line. A position may have none.
    lines: Vec<Vec<Option<f64>>>,
    /// Horizontal lines with names.
    limits: Vec<(String, f64)>,
    log: bool,
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>) {
        let (low, high, ticks) = self.range();
        let frame = Frame::of(area, self, low, high);
        write(area, &self.title, (frame.center(), 14), 15, HPos::Center);
        self.draw_axes(area, &frame, &ticks);
        self.draw_limits(area, &frame);
        self.draw_lines(area, &frame);
    }

    /// A value on the vertical axis, or its logarithm.
    fn height(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    /// The lowest height, the highest one, and the ticks between them.
    fn range(&self) -> (f64, f64, Vec<f64>) {
        let all = || self.lines.iter().flatten().flatten().copied();
        let most = all().chain(self.limits.iter().map(|(_, limit)| *limit)).fold(0.0, f64::max);
        let least = all().fold(f64::INFINITY, f64::min);
        if self.log {
            let (low, high) = (least.log10().floor(), most.log10().ceil());
            return (low, high, (low as i32..=high as i32).map(f64::from).collect());
        }
        let step = nice(most / 6.0);
        // The name of the highest limit stands above it.
        let steps = (most * 1.06 / step).ceil();
        (0.0, step * steps, (0..=steps as i32).map(|tick| step * f64::from(tick)).collect())
    }

    fn draw_axes(&self, area: &Area<'_>, frame: &Frame, ticks: &[f64]) {
        let Frame { left, right, top, bottom, .. } = *frame;
        for tick in ticks {
            let y = frame.y(*tick);
            let line = [(left, y), (right, y)];
            done(area.draw(&PathElement::new(line, RGBColor(220, 220, 220))));
            let name = axis_number(if self.log { 10_f64.powf(*tick) } else { *tick });
            write(area, &name, (left - 6, y), 13, HPos::Right);
        }
        done(area.draw(&PathElement::new([(left, top), (left, bottom), (right, bottom)], BLACK)));
        write(area, self.unit, (left - 6, 14), 14, HPos::Right);
    }

    fn draw_limits(&self, area: &Area<'_>, frame: &Frame) {
        for (name, limit) in &self.limits {
            let y = frame.y(self.height(*limit));
            for x in (frame.left..frame.right).step_by(10) {
                let dash = [(x, y), ((x + 6).min(frame.right), y)];
                done(area.draw(&PathElement::new(dash, GREY.stroke_width(1))));
            }
            write(area, name, (frame.left + 8, y - 9), 13, HPos::Left);
        }
    }

    /// Draws the lines and the names of their positions.
    fn draw_lines(&self, area: &Area<'_>, frame: &Frame) {
        // This crate's line comes first and is drawn last, on top.
        for (line, heights) in self.lines.iter().enumerate().rev() {
            let pixel = |(place, value): (usize, &Option<f64>)| {
                Some((frame.x(place), frame.y(self.height((*value)?))))
            };
            let points: Vec<_> = heights.iter().enumerate().filter_map(pixel).collect();
            done(area.draw(&PathElement::new(points.clone(), colour(line).stroke_width(2))));
            points.into_iter().for_each(|point| marker(area, line, point));
        }
        let bottom = frame.bottom;
        let every = self.places.len().div_ceil(6);
        for (place, name) in self.places.iter().enumerate().step_by(every) {
            let x = frame.x(place);
            done(area.draw(&PathElement::new([(x, bottom), (x, bottom + 5)], BLACK)));
            write(area, name, (x, bottom + 15), 13, HPos::Center);
        }
        write(area, self.along, (frame.center(), bottom + 36), 14, HPos::Center);
    }
}

/// The pixels of a panel's data, and the values at their edges.
struct Frame {
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
    places: usize,
    low: f64,
    high: f64,
}

impl Frame {
    fn of(area: &Area<'_>, panel: &Panel<'_>, low: f64, high: f64) -> Frame {
        let (width, height) = area.dim_in_pixel();
        let (left, right) = (76, width as i32 - 14);
        let (top, bottom) = (34, height as i32 - 50);
        Frame { left, right, top, bottom, places: panel.places.len(), low, high }
    }

    fn center(&self) -> i32 {
        (self.left + self.right) / 2
    }

    /// The pixel of a position. Half a step stays free at both ends.
    fn x(&self, place: usize) -> i32 {
        let last = self.places as f64 - 1.0;
        along(self.left, self.right, (place as f64 + 0.5) / (last + 1.0))
    }

    /// The pixel of a height.
    fn y(&self, height: f64) -> i32 {
        along(self.bottom, self.top, (height - self.low) / (self.high - self.low))
    }
}

fn along(from: i32, to: i32, part: f64) -> i32 {
    from + (f64::from(to - from) * part) as i32
}

/// The next number at or above `step` that is 1, 2 or 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * power >= step);
    times.unwrap_or(10.0) * power
}

/// Panels beside each other, with the names of their lines above.
fn panels(title: &str, names: &[&str], panels: &[Panel<'_>]) -> String {
    let width = 400 * panels.len() as i32;
    let places = key(names, width);
    let top = places.last().map_or(0, |place| place.1) + 20;
    drawn(width as u32, (top + 360) as u32, |area| {
        write(area, title, (20, 20), 19, HPos::Left);
        for (line, (name, (x, y))) in names.iter().zip(places).enumerate() {
            let dash = [(x, y), (x + 26, y)];
            done(area.draw(&PathElement::new(dash, colour(line).stroke_width(2))));
            marker(area, line, (x + 13, y));
            write(area, &plain(name), (x + 34, y), 14, HPos::Left);
        }
        let (_, below) = area.split_vertically(top);
        for (part, panel) in below.split_evenly((1, panels.len())).iter().zip(panels) {
            panel.draw(part);
        }
    })
}

/// The lines of one case. Each name has one value for each position.
fn lines(
    figures: &[&Figure],
    case: &str,
    names: &[&str],
    places: &[usize],
) -> Vec<Vec<Option<f64>>> {
    let height = |name: &str, at: usize| {
        let found = figures.iter().find(|f| f.case == case && f.by == name && f.at == at);
        found.map(|figure| figure.median)
    };
    names.iter().map(|name| places.iter().map(|at| height(name, *at)).collect()).collect()
}

fn of<'a>(run: &'a Run, subject: &str, unit: &str) -> Vec<&'a Figure> {
    run.figures.iter().filter(|figure| figure.subject == subject && figure.unit == unit).collect()
}

/// The bandwidth of the card's link in one direction, with its name.
fn link(run: &Run) -> Option<(String, f64)> {
    let fact = |name: &str| run.machine.get(name)?.parse::<u32>().ok();
    let (generation, lanes) = (fact("pcie generation")?, fact("pcie lanes")?);
    // GB/s of a lane, by its rate of transfers and 128 bits in 130.
    let lane = [8.0, 16.0, 32.0].get(generation.checked_sub(3)? as usize)? * 128.0 / 130.0 / 8.0;
    Some((format!("PCIe {generation} x{lanes}"), lane * f64::from(lanes)))
}

fn bandwidth(run: &Run) -> Option<String> {
    let figures = of(run, "bandwidth", "GB/s");
    let mut places = distinct(figures.iter().map(|figure| figure.at));
    places.sort_unstable();
    let names = distinct(figures.iter().map(|figure| figure.by.as_str()));
    let panel = |case: &str, title: &str, ways: f64| {
        let raw = figures.iter().filter(|figure| figure.case == case && figure.by == RAW);
        let highest = raw.map(|figure| figure.median).reduce(f64::max);
        let mut limits = Vec::new();
        limits.extend(highest.map(|most| (format!("highest raw: {}", number(most)), most)));
        limits.extend(
            link(run).map(|(name, rate)| (format!("{name}: {}", number(rate * ways)), rate * ways)),
        );
        Panel {
            title: title.into(),
            places: places.iter().map(|bytes| size(*bytes)).collect(),
            along: "size of a copy",
            unit: "GB/s",
            lines: lines(&figures, case, &names, &places),
            limits,
            log: false,
        }
    };
    let three = [
        panel("H2D", "host to device", 1.0),
        panel("D2H", "device to host", 1.0),
        panel("both at once", "both at once", 2.0),
    ];
    (!figures.is_empty())
        .then(|| panels("Bandwidth of copies from and to pinned memory", &names, &three))
}

fn pool_cost(run: &Run) -> Option<String> {
    let figures = of(run, "pool", "ns");
    let mut places = distinct(figures.iter().map(|figure| figure.at));
    places.sort_unstable();
    let names = distinct(figures.iter().map(|figure| figure.by.as_str()));
    let panel = |(case, _): (&str, usize)| Panel {
        title: case.into(),
        places: places.iter().map(usize::to_string).collect(),
        along: "threads",
        unit: "ns",
        lines: lines(&figures, case, &names, &places),
        limits: Vec::new(),
        log: true,
    };
    let title = "An acquire and a release, each thread (logarithmic)";
    (!figures.is_empty()).then(|| panels(title, &names, &pool::HELD.map(panel)))
}

fn enqueue(run: &Run) -> Option<String> {
    const LEFT: i32 = 270;
    const PANEL: i32 = 400;
    const BAR: i32 = 26;
    let figures = of(run, "enqueue", "ns");
    let figures: Vec<_> = figures.into_iter().filter(|figure| figure.at == 4096).collect();
    let names = distinct(figures.iter().map(|figure| figure.by.as_str()));
    let most = figures.iter().map(|figure| figure.median).reduce(f64::max)?;
    let step = nice(most / 4.0);
    let end = (most * 1.15 / step).ceil() * step;
    let rows = BAR * names.len() as i32;
    let bottom = 76 + rows;
    let svg = drawn((LEFT + 2 * PANEL) as u32, (bottom + 60) as u32, |area| {
        write(area, "Cost of enqueueing a copy of 4 KB", (20, 20), 19, HPos::Left);
        for (row, name) in names.iter().enumerate() {
            write(
                area,
                &plain(name),
                (LEFT - 10, 76 + BAR * row as i32 + BAR / 2),
                14,
                HPos::Right,
            );
        }
        for (panel, (case, title)) in
            [("H2D", "host to device"), ("D2H", "device to host")].into_iter().enumerate()
        {
            let left = LEFT + panel as i32 * PANEL;
            let width = PANEL - 60;
            let at = |value: f64| left + (value / end * f64::from(width)) as i32;
            write(area, title, (left + width / 2, 56), 15, HPos::Center);
            for tick in (0..).map(|tick| f64::from(tick) * step).take_while(|tick| *tick <= end) {
                let x = at(tick);
                let line = PathElement::new([(x, 70), (x, bottom + 4)], RGBColor(220, 220, 220));
                done(area.draw(&line));
                write(area, &axis_number(tick), (x, bottom + 16), 13, HPos::Center);
            }
            write(area, "ns", (left + width / 2, bottom + 40), 14, HPos::Center);
            for (row, name) in names.iter().enumerate() {
                let Some(figure) = figures.iter().find(|f| f.case == case && f.by == *name) else {
                    continue;
                };
                let top = 76 + BAR * row as i32;
                // This crate's bars in one colour, the others' in another.
                let fill = if name.starts_with(OURS) { BLUE } else { ORANGE };
                let corners = [(left, top + 4), (at(figure.median), top + BAR - 4)];
                done(area.draw(&Rectangle::new(corners, fill.filled())));
                let beside = (at(figure.median) + 6, top + BAR / 2);
                write(area, &number(figure.median), beside, 13, HPos::Left);
            }
            let axis = PathElement::new([(left, 70), (left, bottom + 4)], BLACK);
            done(area.draw(&axis));
        }
    });
    Some(svg)
}

/// Round numbers, as ticks are.
fn axis_number(value: f64) -> String {
    if value >= 1000.0 { number(value) } else { value.to_string() }
}
