//! Mutations of an input, every one of them decided by a seed and a number.

/// A small generator of chances.
pub struct Chance(pub u64);

impl Chance {
    /// The one that belongs to an execution: any of them repeats alone.
    pub fn of(seed: u64, execution: u64) -> Chance {
        let mut chance = Chance(seed ^ execution.wrapping_mul(0xd134_2543_de82_ef95));
        chance.next();
        chance
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`; 0 for none.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Values at the ends of what fields hold.
const EXTREMES: [u64; 18] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x1000,
    0x7fff,
    0xffff,
    0x10000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// The input of an execution: one of the seeds, changed in up to eight places; now and then as it is.
pub fn mutated(
    seeds: &[Vec<u8>],
    tokens: &[&[u8]],
    max_len: usize,
    chance: &mut Chance,
) -> Vec<u8> {
    let mut input = seeds[chance.below(seeds.len())].clone();
    if chance.below(64) == 0 {
        return input;
    }
    // One change most often: several at once rarely get past the first reader.
    let changes = [1, 1, 1, 2, 2, 3, 5, 8][chance.below(8)];
    for _ in 0..changes {
        change(&mut input, seeds, tokens, chance);
    }
    input.truncate(max_len.max(seeds.iter().map(Vec::len).max().unwrap_or(0)));
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], tokens: &[&[u8]], chance: &mut Chance) {
    let len = input.len();
    let at = chance.below(len + 1);
    match chance.below(12) {
        0 | 1 if at < len => input[at] ^= 1 << chance.below(8),
        2 if at < len => input[at] = chance.next() as u8,
        3 | 4 => overwrite_number(input, at, chance),
        5 => add(input, at, chance),
        6 => input.truncate(at),
        7 => {
            let end = (at + 1 + chance.below(64)).min(len);
            input.drain(at..end.max(at));
        }
        8 => {
            let end = (at + 1 + chance.below(256)).min(len);
            let piece = input[at..end.max(at)].to_vec();
            let to = chance.below(len + 1);
            input.splice(to..to, piece);
        }
        9 => {
            let other = &seeds[chance.below(seeds.len())];
            let from = chance.below(other.len());
            let end = from + 1 + chance.below(other.len().saturating_sub(from));
            let piece = other[from..end.min(other.len())].to_vec();
            let over = chance.below(piece.len() + 1).min(len - at);
            input.splice(at..at + over, piece);
        }
        10 if !tokens.is_empty() => {
            let token = tokens[chance.below(tokens.len())];
            let over = if chance.below(2) == 0 { token.len() } else { 0 };
            input.splice(at..(at + over).min(len), token.iter().copied());
        }
        _ => {
            let fill = [0, 0xff, b'.'][chance.below(3)];
            let end = (at + 1 + chance.below(16)).min(len);
            input[at.min(end)..end].fill(fill);
        }
    }
}

fn overwrite_number(input: &mut [u8], at: usize, chance: &mut Chance) {
    let value = EXTREMES[chance.below(EXTREMES.len())].to_le_bytes();
    let width = [1, 2, 4, 8][chance.below(4)].min(input.len() - at);
    input[at..at + width].copy_from_slice(&value[..width]);
}

/// Adds a little to a number.
fn add(input: &mut [u8], at: usize, chance: &mut Chance) {
    let width = [1, 2, 4, 8][chance.below(4)].min(input.len() - at);
    let mut value = [0; 8];
    value[..width].copy_from_slice(&input[at..at + width]);
    let by = (chance.below(33) as u64).wrapping_sub(16);
    let value = u64::from_le_bytes(value).wrapping_add(by).to_le_bytes();
    input[at..at + width].copy_from_slice(&value[..width]);
}
