//! What would change a choice: the same pure function, asked about facts that are a little different. Plain values, on any
//! thread.

use crate::SECTOR_SIZE;
use crate::choose::{Access, Choice, Wish, choose};
use crate::direct::Alignment;
use crate::extents::Blocks;
use crate::facts::{Direct, Facts, Kind};
use crate::filesystem::Filesystem;

/// A change, and what it leads to.
#[derive(Clone, Debug)]
pub struct Alternative {
    /// What to change, as the beginning of a sentence: the end is what runs then.
    pub change: String,
    /// What runs then.
    pub choice: Choice,
}

/// The single changes after which something else runs than `choice`, which `facts` and `wish` led to.
pub fn alternatives(facts: &Facts, wish: Wish, choice: &Choice) -> Vec<Alternative> {
    let others = changes(facts, wish).into_iter().filter_map(|(change, facts, wish)| {
        let other = choose(&facts, wish).ok()?;
        let differs = (other.engines.best(), other.cache) != (choice.engines.best(), choice.cache);
        differs.then_some(Alternative { change, choice: other })
    });
    others.collect()
}

/// Every change that may matter.
fn changes(facts: &Facts, wish: Wish) -> Vec<(String, Facts, Wish)> {
    let mut changes = vec![
        ("left to skiff (aio=auto, cache=auto)".to_owned(), facts.clone(), Wish { aio: None, cache: None, ..wish }),
        ("with readonly=on".to_owned(), facts.clone(), Wish { access: Access::Read, ..wish }),
    ];
    let mut change = |what: String, change: &dyn Fn(&mut Facts)| {
        let mut other = facts.clone();
        change(&mut other);
        changes.push((what, other, wish));
    };
    let path = facts.path.display();
    if let Err(unusable) = &facts.host.native {
        change(format!("were linux-aio usable ({})", unusable.remedy()), &|it: &mut Facts| it.host.native = Ok(()));
    }
    if let Err(unusable) = &facts.host.io_uring {
        change(format!("were io_uring usable ({})", unusable.remedy()), &|it: &mut Facts| it.host.io_uring = Ok(()));
    }
    if let Direct::Works(Alignment { block, .. }) = facts.direct {
        let whole = facts.size.next_multiple_of(block);
        change(format!("were the last block whole (truncate -s {whole} \"{path}\")"), &|it: &mut Facts| {
            it.size = whole;
        });
    }
    let Kind::File { filesystem, blocks } = facts.kind else { return changes };
    let having = |blocks| move |it: &mut Facts| it.kind = Kind::File { filesystem, blocks };
    match blocks {
        Blocks::Sparse { .. } => {
            let how = format!("had every byte its block (fallocate -l {} \"{path}\")", facts.size);
            change(how, &having(Blocks::Reserved));
        }
        Blocks::Shared => {
            let how = format!("were no blocks shared (copy it with cp --reflink=never \"{path}\" COPY)");
            change(how, &having(Blocks::Written));
        }
        Blocks::Written | Blocks::Reserved => {}
    }
    change("on a filesystem such as ext4 or xfs".to_owned(), &|it: &mut Facts| {
        it.kind = Kind::File { filesystem: Filesystem::EXT4, blocks };
        it.direct = Direct::Works(Alignment { memory: SECTOR_SIZE as usize, block: SECTOR_SIZE });
        it.nowait = true;
    });
    changes
}
