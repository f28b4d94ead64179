//! What a serving engine knows on the host: which requests there are, and which of their tokens go into the next step.
//! `decode_loop.py` has the same one, so that both have the same to do.

pub const MAX_REQUESTS: usize = 1024;
/// Of all requests in one step: a token of each, and as many of prompts.
pub const MAX_TOKENS: usize = MAX_REQUESTS + PROMPT_TOKENS;
const PROMPT_TOKENS: usize = 2048;
/// Tokens of a block of the cache, and blocks of a request at the most.
pub const BLOCK: u32 = 16;
pub const BLOCKS: usize = 128;
const VOCABULARY: u32 = 32_000;

/// A request; its row is its place among the others.
pub struct Request {
    pub seed: u64,
    prompt: u32,
    /// The length at which it ends.
    total: u32,
    /// Tokens that earlier steps worked on, and that this one does.
    pub computed: u32,
    pub scheduled: u32,
    blocks: u32,
    /// Its row in the last two steps, by the step's parity, and in the one whose result it goes on with.
    rows: [u32; 2],
    source: u32,
}

impl Request {
    /// Its tokens of this step, and their positions. `sampled` is what came of the step before the last: an engine
    /// that prepares a step while the device works on the one before has nothing newer. A prompt goes in two parts,
    /// the second of one token, so that there is something when it is needed.
    pub fn tokens(&self, sampled: &[u32]) -> impl Iterator<Item = (i32, u32)> {
        let decodes = self.computed >= self.prompt;
        let decoded = if decodes { sampled[self.source as usize] % VOCABULARY } else { 0 };
        let token = move |position| match decodes {
            true => decoded,
            false => mix((self.seed as u32).wrapping_add(position)) % VOCABULARY,
        };
        (self.computed..self.computed + self.scheduled).map(move |at| (token(at) as i32, at))
    }

    /// A number of 0 to 255 for one of its sampling parameters.
    pub fn parameter(&self, number: u32) -> f32 {
        (self.seed >> (8 * number) & 255) as f32
    }
}

pub struct Engine {
    /// The number of the step, from 1 on.
    pub step: u64,
    pub live: Vec<Request>,
    /// The most that are live.
    requests: usize,
    /// Each request's blocks of the cache, by its row.
    table: Vec<i32>,
    /// The step in which a row's blocks or parameters changed last.
    changed: Vec<u64>,
    free: Vec<i32>,
    random: u64,
}

impl Engine {
    pub fn new(requests: usize) -> Engine {
        Engine {
            step: 0,
            live: Vec::with_capacity(MAX_REQUESTS),
            requests,
            table: vec![0; MAX_REQUESTS * BLOCKS],
            changed: vec![0; MAX_REQUESTS],
            free: (0..(MAX_REQUESTS * BLOCKS) as i32).rev().collect(),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Xorshift, by Marsaglia.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// A row's blocks of the cache.
    pub fn blocks(&self, row: usize) -> &[i32] {
        &self.table[row * BLOCKS..(row + 1) * BLOCKS]
    }

    /// Whether a row's blocks or parameters have changed since a step.
    pub fn has_changed(&self, row: usize, since: u64) -> bool {
        self.changed[row] > since
    }

    /// Decides what the next step works on: requests end, others come, and all others go on by a token.
    pub fn schedule(&mut self) {
        self.step += 1;
        for request in &mut self.live {
            request.computed += request.scheduled;
            request.scheduled = request.prompt.saturating_sub(request.computed).max(1);
        }
        let mut row = 0;
        while row < self.live.len() {
            match self.live[row].computed >= self.live[row].total {
                true => self.end(row),
                false => row += 1,
            }
        }
        self.admit();
        let parity = (self.step % 2) as usize;
        for row in 0..self.live.len() {
            let request = &mut self.live[row];
            request.source = std::mem::replace(&mut request.rows[parity], row as u32);
            let blocks = (request.computed + request.scheduled).div_ceil(BLOCK);
            while request.blocks < blocks {
                let block = self.free.pop().expect("there are enough for all rows");
                self.table[row * BLOCKS + request.blocks as usize] = block;
                request.blocks += 1;
                self.changed[row] = self.step;
            }
        }
    }

    /// Ends a request; the last one takes its row.
    fn end(&mut self, row: usize) {
        let ended = self.live.swap_remove(row);
        let start = row * BLOCKS;
        self.free.extend_from_slice(&self.table[start..start + ended.blocks as usize]);
        let last = self.live.len() * BLOCKS;
        self.table.copy_within(last..last + BLOCKS, start);
        self.changed[row] = self.step;
    }

    fn admit(&mut self) {
        let drawn = self.draw();
        let few = self.live.len() * 4 < self.requests * 3;
        let most = if few { self.requests } else { drawn as usize % 4 };
        let mut room = PROMPT_TOKENS as u32;
        for _ in 0..most {
            if self.live.len() == self.requests || room < 512 {
                break;
            }
            let seed = self.draw();
            let prompt = 2 + (seed >> 8) as u32 % 511;
            let total = prompt + 16 + (seed >> 24) as u32 % 257;
            let row = self.live.len();
            self.table[row * BLOCKS..(row + 1) * BLOCKS].fill(0);
            self.changed[row] = self.step;
            let (computed, scheduled) = (0, prompt - 1);
            room -= scheduled;
            let (blocks, rows, source) = (0, [0; 2], 0);
            let request =
                Request { seed, prompt, total, computed, scheduled, blocks, rows, source };
            self.live.push(request);
        }
    }
}

/// Spreads every bit over all: "lowbias32", by Wellons.
pub fn mix(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x7feb_352d);
    let word = (word ^ word >> 15).wrapping_mul(0x846c_a68b);
    word ^ word >> 16
}
