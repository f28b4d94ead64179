//! The inputs of a decode loop: by a ring of this crate, and by new tensors in each step.

use std::mem::ManuallyDrop;
use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_nn::ops::softmax;
use cpu_gpu_buffer as cgb;
use cpu_gpu_buffer::{GroupLayoutBuilder, GroupRing, MemberKey, MemberRows, Stream};

use crate::loader::Failure;
use crate::ours;

/// What the command line says.
pub struct Options {
    pub steps: usize,
    pub requests: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { steps: 2000, requests: 64 }
    }
}

/// The tokens that the model looks at.
const WINDOW: usize = 32;
const VOCABULARY: usize = 2048;
const WIDTH: usize = 128;
const HEADS: usize = 4;
const DEPTH: usize = 3;

/// The inputs of a step on the host.
struct Step {
    /// The window of each request: the latest tokens, from its end backwards.
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// 0 for a token, and minus infinity where a request has none.
    mask: Vec<f32>,
    /// The place of the newest token, among all windows.
    last: Vec<u32>,
    temperature: Vec<f32>,
    penalty: Vec<f32>,
    /// The newest token, which is penalized.
    newest: Vec<u32>,
    /// Added to all logits of a request.
    bias: Vec<f32>,
}

impl Step {
    fn new(requests: usize) -> Step {
        let each = |value: fn(usize) -> f32| (0..requests).map(value).collect();
        Step {
            ids: vec![0; requests * WINDOW],
            positions: vec![0; requests * WINDOW],
            mask: vec![f32::NEG_INFINITY; requests * WINDOW],
            last: vec![0; requests],
            temperature: each(|request| 0.5 + (request % 7) as f32 / 8.0),
            penalty: each(|request| (request % 3) as f32 / 4.0),
            newest: vec![0; requests],
            bias: each(|request| (request % 5) as f32),
        }
    }

    /// The inputs of step `number`, after these tokens were sampled.
    fn advance(&mut self, number: usize, sampled: &[u32]) {
        for (request, token) in sampled.iter().enumerate() {
            let (first, at) = (request * WINDOW, number % WINDOW);
            self.ids[first + at] = *token;
            self.positions[first + at] = (number % 512) as u32;
            self.mask[first + at] = 0.0;
            self.last[request] = (first + at) as u32;
            self.newest[request] = *token;
        }
    }
}

/// The inputs of a step on the device.
#[derive(Clone)]
struct Inputs {
    ids: Tensor,
    positions: Tensor,
    mask: Tensor,
    last: Tensor,
    temperature: Tensor,
    penalty: Tensor,
    newest: Tensor,
    bias: Tensor,
}

impl Inputs {
    /// New tensors, as candle makes them.
    fn new(step: &Step, device: &Device) -> candle_core::Result<Inputs> {
        let requests = step.last.len();
        Ok(Inputs {
            ids: Tensor::from_slice(&step.ids, (requests, WINDOW), device)?,
            positions: Tensor::from_slice(&step.positions, (requests, WINDOW), device)?,
            mask: Tensor::from_slice(&step.mask, (requests, WINDOW), device)?,
            last: Tensor::from_slice(&step.last, requests, device)?,
            temperature: Tensor::from_slice(&step.temperature, requests, device)?,
            penalty: Tensor::from_slice(&step.penalty, requests, device)?,
            newest: Tensor::from_slice(&step.newest, requests, device)?,
            bias: Tensor::from_slice(&step.bias, requests, device)?,
        })
    }
}

/// A transformer of one layer with random weights.
struct Model {
    tokens: Tensor,
    places: Tensor,
    qkv: Tensor,
    out: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Model {
    fn new(device: &Device) -> candle_core::Result<Model> {
        // The same on every device.
        let weight = |rows: usize, columns: usize, seed: u32| {
            let numbers = (0..(rows * columns) as u32).map(|at| {
                let mixed = (at ^ seed << 24).wrapping_mul(0x9e37_79b9);
                ((mixed ^ mixed >> 15) % 2001) as f32 / 1000.0 - 1.0
            });
            let scale = (columns as f32).sqrt();
            Tensor::from_vec(
                numbers.map(|number| number / scale).collect(),
                (rows, columns),
                device,
            )
        };
        Ok(Model {
            tokens: weight(VOCABULARY, WIDTH, 1)?,
            places: weight(512, WIDTH, 2)?,
            qkv: weight(3 * WIDTH, WIDTH, 3)?,
            out: weight(WIDTH, WIDTH, 4)?,
            up: weight(4 * WIDTH, WIDTH, 5)?,
            down: weight(WIDTH, 4 * WIDTH, 6)?,
        })
    }

    /// The logits of each request's next token.
    fn logits(&self, inputs: &Inputs) -> candle_core::Result<Tensor> {
        let (requests, all) = (inputs.last.elem_count(), inputs.ids.elem_count());
        let ids = self.tokens.index_select(&inputs.ids.flatten_all()?, 0)?;
        let x = (ids + self.places.index_select(&inputs.positions.flatten_all()?, 0)?)?;
        let heads = |x: Tensor| {
            let x = x.reshape((requests, WINDOW, HEADS, WIDTH / HEADS))?;
            x.transpose(1, 2)?.contiguous()
        };
        let qkv = x.matmul(&self.qkv.t()?)?.reshape((all, 3, WIDTH))?;
        let part = |index: usize| heads(qkv.i((.., index))?.contiguous()?);
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? / ((WIDTH / HEADS) as f64).sqrt())?;
        let scores = scores.broadcast_add(&inputs.mask.reshape((requests, 1, 1, WINDOW))?)?;
        let mixed = softmax(&scores, D::Minus1)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?.reshape((all, WIDTH))?;
        // From here on, the newest token of each request alone.
        let x = (x + mixed.matmul(&self.out.t()?)?)?.index_select(&inputs.last, 0)?;
        let x = (&x + x.matmul(&self.up.t()?)?.gelu()?.matmul(&self.down.t()?)?)?;
        let logits = x.matmul(&self.tokens.t()?)?;
        let column = |row: &Tensor| row.reshape((requests, 1));
        let penalty = (column(&inputs.penalty)? * -1.0)?;
        let logits = logits.scatter_add(&column(&inputs.newest)?, &penalty, 1)?;
        logits.broadcast_add(&column(&inputs.bias)?)?.broadcast_div(&column(&inputs.temperature)?)
    }
}

/// The inputs in a ring.
struct Ring {
    /// Tensors in the ring's device side, whose address never changes. They must not free it.
    /// `None` on the CPU, where candle borrows no memory.
    inputs: Option<ManuallyDrop<Inputs>>,
    ring: GroupRing,
    words: [MemberKey<u32>; 4],
    numbers: [MemberKey<f32>; 4],
    rows: Vec<MemberRows>,
}

impl Ring {
    fn new(requests: usize, device: &Device, stream: &Stream) -> Result<Ring, Failure> {
        let mut builder = GroupLayoutBuilder::new();
        let (window, row) = ([requests, WINDOW], [requests, 1]);
        let words = [window, window, row, row].map(|shape| builder.add::<u32>(shape));
        let numbers = [window, row, row, row].map(|shape| builder.add::<f32>(shape));
        let mut ring = GroupRing::new(&builder.build()?, stream.device(), DEPTH)?;
        let mut rows: Vec<MemberRows> = words.map(Into::into).into();
        rows.extend(numbers.map(MemberRows::from));
        if let Device::Cpu = device {
            return Ok(Ring { inputs: None, ring, words, numbers, rows });
        }
        let mut view = ring.gpu_on(stream)?;
        let (window, row) = (vec![requests, WINDOW], vec![requests]);
        let mut word = |index: usize, shape: &[usize]| {
            let address = view.member(words[index])?.as_mut_ptr().cast();
            // SAFETY: the ring has the member's elements there, and outlives the tensor, which is
            // never dropped. Both libraries use one stream.
            unsafe { ours::borrowed(address, DType::U32, shape, device) }
        };
        let (ids, positions) = (word(0, &window)?, word(1, &window)?);
        let (last, newest) = (word(2, &row)?, word(3, &row)?);
        let mut number = |index: usize, shape: &[usize]| {
            let address = view.member(numbers[index])?.as_mut_ptr().cast();
            // SAFETY: as above.
            unsafe { ours::borrowed(address, DType::F32, shape, device) }
        };
        let (mask, temperature) = (number(0, &window)?, number(1, &row)?);
        let (penalty, bias) = (number(2, &row)?, number(3, &row)?);
        let inputs = Inputs { ids, positions, mask, last, temperature, penalty, newest, bias };
        Ok(Ring { inputs: Some(ManuallyDrop::new(inputs)), ring, words, numbers, rows })
    }

    /// Uploads the inputs of a step in one copy.
    fn upload(&mut self, step: &Step, stream: &Stream) -> cgb::Result<()> {
        self.ring.advance()?;
        let mut members = self.ring.members_mut();
        let words = [&step.ids, &step.positions, &step.last, &step.newest];
        let numbers = [&step.mask, &step.temperature, &step.penalty, &step.bias];
        for (key, from) in self.words.into_iter().zip(words) {
            members.cpu_mut(key)?.copy_from_slice(from);
        }
        for (key, from) in self.numbers.into_iter().zip(numbers) {
            members.cpu_mut(key)?.copy_from_slice(from);
        }
        self.ring.copy_to_gpu(&self.rows, stream)
    }

    /// The inputs that were uploaded last.
    fn inputs(&mut self, stream: &Stream) -> Result<Inputs, Failure> {
        // Enters the ring's device side, so that the next upload comes after the model.
        let mut view = self.ring.gpu_on(stream)?;
        if let Some(inputs) = &self.inputs {
            return Ok(Inputs::clone(inputs));
        }
        let mut words = Vec::new();
        for key in self.words {
            words.push(view.member(key)?.into_host_slice().ok_or("it is on the CPU")?.to_vec());
        }
        let mut numbers = Vec::new();
        for key in self.numbers {
            numbers.push(view.member(key)?.into_host_slice().ok_or("it is on the CPU")?.to_vec());
        }
        let gone = "each member once";
        let (mut words, mut numbers) = (words.into_iter(), numbers.into_iter());
        let mut word = || words.next().expect(gone);
        let (ids, positions, last, newest) = (word(), word(), word(), word());
        let mut number = || numbers.next().expect(gone);
        let (mask, temperature, penalty, bias) = (number(), number(), number(), number());
        let step = Step { ids, positions, mask, last, temperature, penalty, newest, bias };
        Ok(Inputs::new(&step, &Device::Cpu)?)
    }
}

/// What a way took.
#[derive(Default)]
struct Times {
    inputs: Vec<Duration>,
    all: Duration,
}

impl Times {
    fn print(&mut self, name: &str, requests: usize) {
        self.inputs.sort();
        let at = |share: f64| {
            let index = (self.inputs.len() - 1) as f64 * share;
            self.inputs[index as usize].as_secs_f64() * 1e6
        };
        let (median, high) = (at(0.5), at(0.99));
        let rate = (self.inputs.len() * requests) as f64 / self.all.as_secs_f64();
        println!("{name:16} inputs {median:7.1} us, p99 {high:7.1} us; {rate:9.0} tokens/s");
    }
}

/// Runs the loop. Returns the logits of the last step, and a sum over the tokens of all steps.
fn run(
    options: &Options,
    mut logits: impl FnMut(&Step, &mut Vec<Duration>) -> Result<Tensor, Failure>,
) -> Result<(Times, Vec<Vec<f32>>, u64), Failure> {
    let mut step = Step::new(options.requests);
    let mut sampled: Vec<u32> = (0..options.requests as u32).collect();
    let (mut times, mut sum, mut last) = (Times::default(), 0u64, None);
    let start = Instant::now();
    for number in 0..options.steps {
        step.advance(number, &sampled);
        let logits = logits(&step, &mut times.inputs)?;
        sampled = logits.argmax(D::Minus1)?.to_vec1()?;
        for token in &sampled {
            sum = sum.wrapping_mul(31).wrapping_add(u64::from(*token));
        }
        last = Some(logits);
    }
    times.all = start.elapsed();
    Ok((times, last.expect("at least one step").to_vec2()?, sum))
}

/// Runs the loop in both ways, compares the logits, and prints the times.
pub fn compare(device: &Device, options: &Options) -> Result<(), Failure> {
    let (model, stream) = (Model::new(device)?, ours::stream(device)?);
    let candle = |step: &Step, times: &mut Vec<Duration>| {
        let start = Instant::now();
        let inputs = Inputs::new(step, device)?;
        times.push(start.elapsed());
        Ok(model.logits(&inputs)?)
    };
    let mut ring = Ring::new(options.requests, device, &stream)?;
    let mut by_ring = |step: &Step, times: &mut Vec<Duration>| {
        let start = Instant::now();
        ring.upload(step, &stream)?;
        let inputs = ring.inputs(&stream)?;
        times.push(start.elapsed());
        Ok(model.logits(&inputs)?)
    };
    // The first steps load kernels.
    let warm = Options { steps: options.steps.min(8), ..*options };
    run(&warm, candle)?;
    run(&warm, &mut by_ring)?;
    let (mut theirs, their_logits, their_tokens) = run(options, candle)?;
    let (mut ours, our_logits, our_tokens) = run(options, &mut by_ring)?;
    device.synchronize()?;
    theirs.print("new tensors", options.requests);
    ours.print("ring", options.requests);
    if their_logits != our_logits || their_tokens != our_tokens {
        return Err("the logits differ".into());
    }
    println!("the same logits and tokens in all {} steps", options.steps);
    Ok(())
}
